"""Links code in a page's text to the documentation of the object that it names, so that the pages
need no roles, which GitHub shows as text."""

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform


class LinkedNames(SphinxPostTransform):
    default_priority = 5  # before Sphinx resolves references

    def run(self) -> None:
        documented = self.env.get_domain("py").objects
        for literal in list(self.document.findall(nodes.literal)):
            name = literal.astext()
            is_linked = isinstance(literal.parent, nodes.reference | pending_xref)
            if name in documented and not is_linked:
                link = pending_xref(
                    refdoc=self.env.docname, refdomain="py", reftype="obj", reftarget=name
                )
                literal.replace_self(link)
                link += literal


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_post_transform(LinkedNames)
    return {"parallel_read_safe": True}
