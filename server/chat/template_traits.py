"""What a chat template looks at: found in its source, without running it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import jinja2.meta
from jinja2 import nodes

_WORD = re.compile(r"\w+")
_TEXT_TESTS = ("string", "iterable", "sequence", "mapping")
"""Tests that tell a text from a list of parts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TemplateTraits:
    """The parts of a chat that a template knows."""

    has_tools: bool
    """It shows tools to the model."""
    has_calls: bool
    """It shows the calls of earlier messages."""
    has_developer: bool
    """It has an idea of its own of the role `developer`."""
    has_parts: bool
    """It goes through the parts of a content."""
    has_texts: bool
    """It takes a content that is one text; only one that goes through parts may not."""

    @classmethod
    def of(cls, tree: nodes.Template) -> TemplateTraits:
        names = _content_names(tree)
        has_parts = any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))
        has_kinds = any(_is_content(test.node, names) for test in tree.find_all(nodes.Test) if test.name in _TEXT_TESTS)
        words = _words(tree)
        return cls(
            has_tools="tools" in jinja2.meta.find_undeclared_variables(tree),
            has_calls="tool_calls" in words,
            has_developer="developer" in words,
            has_parts=has_parts,
            has_texts=has_kinds or not has_parts,
        )


def words_of(source: str) -> set[str]:
    """The words outside of comments, the names of variables among them, of a source that may be no template."""
    head, *rest = source.split("{#")
    return {word for text in (head, *(part.partition("#}")[2] for part in rest)) for word in _WORD.findall(text)}


def _words(tree: nodes.Template) -> set[str]:
    """Constants and names of attributes in the expressions: comments and the text around them are no part of it."""
    attributes = {node.attr for node in tree.find_all(nodes.Getattr)}
    return attributes | {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}


def _content_names(tree: nodes.Template) -> set[str]:
    """Variables that hold a content: those called so, as in macros, and what is set to one."""
    names = {"content"}
    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and _is_content(assignment.node, names):
            names.add(assignment.target.name)
    return names


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    """Whether an expression is a message's content, perhaps filtered."""
    match node:
        case nodes.Filter(node=nodes.Node() as inner):
            return _is_content(inner, names)
        case nodes.Name(name=name):
            return str(name) in names
        case nodes.Getattr(attr=attribute):
            return str(attribute) == "content"
        case nodes.Getitem(arg=nodes.Const(value=key)):
            return isinstance(key, str) and key == "content"
    return False
