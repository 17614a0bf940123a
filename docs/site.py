"""What mkdocs.yml asks for: the repository's folders on the site, and links where docstrings refer to each other."""

import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_PAGES = ("*.md", "docs/**/*.md", "docs/*.png", "bench/results/*.md", "bench/results/*/*.png")
_ROLE = re.compile(
    r":(?:class|func|meth|mod):`([^`<]*?)(?: <([^`>]+)>)?`"
)  # :func:`~pm_models.compress`, as Sphinx has it


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The theme's files, and ours by their paths in the repository: so every link is as it is on GitHub."""
    root = Path(config.config_file_path).parent
    ours = [path for pattern in _PAGES for path in sorted(root.glob(pattern))]
    pages = (File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path)) for path in ours)
    return Files([*(file for file in files if file.src_dir != config.docs_dir), *pages])


class Roles(griffe.Extension):
    """References in docstrings as links, where what they name is on the site."""

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        _link(pkg)


def _link(owner: griffe.Object) -> None:
    def link(role: re.Match) -> str:
        shown, target = role[1].rsplit(".")[-1] if role[1].startswith("~") else role[1], role[2] or role[1].lstrip("~")
        try:
            target = owner.resolve(target)
        except griffe.NameResolutionError:
            pass
        return f'<autoref optional identifier="{target}"><code>{shown}</code></autoref>'

    if owner.docstring is not None:
        owner.docstring.value = _ROLE.sub(link, owner.docstring.value)
    for member in owner.members.values():
        if not member.is_alias:
            _link(member)
