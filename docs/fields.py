"""For griffe: the fields of a dataclass, each with the comment behind it, become attributes in its docstring.

Fields are documented by trailing comments in this project, which documentation tools do not read.
"""

import re

import griffe

COMMENT = re.compile(r"\s#\s+(?!fmt:|noqa|type:)(.+)$")


def described(field: griffe.Attribute) -> str:
    """A line of a Google-style section, from the last line of a field's source."""
    comment = COMMENT.search(field.source.rstrip())
    words = [comment[1].rstrip(".") + "."] if comment else []
    value = str(field.value) if field.value is not None else None
    if value is None:
        words.append("" if comment else "Required.")
    else:
        words.append("Default: that of its type." if value.startswith("field(") else f"Default: `{value}`.")
    return f"    {field.name}: {' '.join(words).rstrip()}"


class Fields(griffe.Extension):
    def on_class(self, *, cls: griffe.Class, **_) -> None:
        if "dataclass" not in {str(decorator.value).split("(")[0] for decorator in cls.decorators}:
            return
        text = cls.docstring.value if cls.docstring else "A record with these fields."
        if "Attributes:" in text:
            return
        fields = [
            member
            for name, member in cls.members.items()
            if member.is_attribute and not name.startswith("_") and member.annotation is not None
            if "property" not in member.labels
        ]
        section = "\n".join(["Attributes:", *map(described, fields)])
        cls.docstring = griffe.Docstring(f"{text}\n\n{section}", parent=cls, parser="google")
