"""Text of a row filter -> tree of sqlglot's expressions; ValueError for what is not in the language.

The language has Python's words (`==`, `None`, `x in [1, 2]`, `0 < x < 9`), as stored plans have. Its tokens are
listed here, and sqlglot's parser knows no function and no keyword besides them.
"""

import functools
import keyword
from typing import ClassVar

from sqlglot import exp, parser, tokens
from sqlglot.dialects.dialect import Dialect
from sqlglot.errors import ParseError, TokenError
from sqlglot.tokens import Token, TokenType

EXAMPLE = "an example is punsafe < 0.1 and AESTHETIC_SCORE > 5"
OPERATORS = "and, or, not, < <= > >= == !=, in [..], is None, + - * /, len, lower, contains, match"
COMPARISONS: dict[type[exp.Expr], str] = {exp.LT: "<", exp.LTE: "<=", exp.GT: ">", exp.GTE: ">=", exp.EQ: "==",
                                          exp.NEQ: "!="}
_MAX_CHARACTERS = 10_000
_MAX_BRACKETS = 20  # sqlglot uses up to 30 of Python's 1000 stack frames for each that is open
_MAX_DEPTH = 60  # levels of the tree
_WORDS = {"and": TokenType.AND, "or": TokenType.OR, "not": TokenType.NOT, "in": TokenType.IN, "is": TokenType.IS,
          "None": TokenType.NULL, "True": TokenType.TRUE, "False": TokenType.FALSE}
_HINTS = {"=": "compare with ==", "#": "remove the comment", ";": "write one expression, without ;"}


class Language(Dialect):
    """The tokens that sqlglot's parser gets to see."""

    NUMBERS_CAN_BE_UNDERSCORE_SEPARATED = True

    class Tokenizer(tokens.Tokenizer):
        """Tokens of the language: quotes, no comments."""
        QUOTES: ClassVar = ["'", '"']
        IDENTIFIERS: ClassVar = ["`"]
        STRING_ESCAPES: ClassVar = ["\0"]  # sqlglot wants one; a backslash is a backslash
        COMMENTS: ClassVar = []
        HINT_START = "\0"
        KEYWORDS: ClassVar = {"<=": TokenType.LTE, ">=": TokenType.GTE, "==": TokenType.EQ, "!=": TokenType.NEQ}
        SINGLE_TOKENS: ClassVar = {sign: kind for sign, kind in tokens.Tokenizer.SINGLE_TOKENS.items()
                                   if sign in "()[]{},.+-*/<>'\"`"}

    class Parser(parser.Parser):
        """A parser without functions: row_filter.py allows some by name."""
        FUNCTIONS: ClassVar = {}
        FUNCTION_PARSERS: ClassVar = {}
        NO_PAREN_FUNCTIONS: ClassVar = {}
        NO_PAREN_FUNCTION_PARSERS: ClassVar = {}


def syntax_error(text: str, what: str, hint: str) -> ValueError:
    """An error that quotes the expression and has a hint."""
    return ValueError(f"{shorten(text)} {what}\nhint: {hint}")


def shorten(text: str) -> str:
    """At most 80 characters of a text, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "..."


def join_names(names: list[str]) -> str:
    """At most 60 names, and how many more there are."""
    return ", ".join(names[:60]) + (f" and {len(names) - 60} more" if len(names) > 60 else "")


def source_text(node: exp.Expr) -> str:
    """A part of an expression, for a message."""
    return shorten(node.sql(Language, normalize_functions=False))


@functools.lru_cache(64)
def parse(text: str) -> exp.Expr:
    """The tree of a text."""
    if not text.strip():
        raise ValueError(f"the expression is empty\nhint: {EXAMPLE}")
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(f"the expression has {len(text)} characters, {_MAX_CHARACTERS} are allowed")
    try:
        [parsed] = Language().parser().parse_into(exp.Condition, _tokens(text), text)
        assert parsed is not None  # the text is not empty
        tree: exp.Expr = parsed
        level = [tree]
        for _ in range(_MAX_DEPTH):
            level = [child for node in level for child in (
                node.flatten(unnest=False) if isinstance(node, exp.Connector) else node.iter_expressions())]
    except TokenError:
        raise syntax_error(text, "has no second quote or backtick for the last one", "both come in pairs") from None
    except ParseError as problem:
        place = problem.errors[0]["highlight"] if problem.errors else "the end"
        raise syntax_error(text, f"cannot be read near {place}",
                    f'text goes into "quotes", unusual names into `backticks`; operators are {OPERATORS}') from None
    except RecursionError:
        level = [exp.Null()]
    if level:
        raise syntax_error(text, "is nested too deeply", f"{_MAX_DEPTH} levels are allowed")
    return tree


def _tokens(text: str) -> list[Token]:
    """Sqlglot's tokens, with the words of the language as keywords, in lower case as in Python."""
    result: list[Token] = []
    brackets = prefixes = 0
    for token in Language().tokenize(text):
        kind, word, last = token.token_type, token.text, result[-1] if result else None
        touches = last is not None and last.end + 1 == token.start
        if token.comments:
            raise syntax_error(text, "has a comment", _HINTS["#"])
        if kind == TokenType.VAR and word in _WORDS:
            token = Token(_WORDS[word], word, token.line, token.col, token.start, token.end)
        elif kind == TokenType.VAR:
            after_number = last is not None and touches and last.token_type == TokenType.NUMBER
            if keyword.iskeyword(word) or not word.isidentifier() or after_number:
                hints = [hint for sign, hint in _HINTS.items() if sign in word]
                raise syntax_error(text, f"cannot be read at {word!r}", *hints[:1] or [
                    f"numbers are decimal, other names go into `backticks`; operators are {OPERATORS}"])
        elif kind == TokenType.STRING and touches and last and last.text in {"r", "R"}:
            result.pop()  # r".." and ".." are the same
        prefixes = prefixes + 1 if token.token_type in {TokenType.NOT, TokenType.DASH, TokenType.PLUS} else 0
        brackets += (word in {"(", "[", "{"}) - (word in {")", "]", "}"}) if kind != TokenType.STRING else 0
        if brackets + prefixes > _MAX_BRACKETS:
            raise syntax_error(text, "is nested too deeply", f"{_MAX_BRACKETS} brackets are allowed within each other")
        result.append(token)
    return result


def pairs(node: exp.Expr) -> list[tuple[exp.Expr, str, exp.Expr]]:
    """The comparisons of a chain, as 0 < a and a <= 2 of `0 < a <= 2`; [] if `node` compares nothing."""
    operands, signs = _chain(node)
    return list(zip(operands, signs, operands[1:], strict=False))


def _chain(node: exp.Expr) -> tuple[list[exp.Expr], list[str]]:
    if type(node) in COMPARISONS:
        (first_operands, first_signs), (last_operands, last_signs) = _chain(node.this), _chain(node.expression)
        return first_operands + last_operands, [*first_signs, COMPARISONS[type(node)], *last_signs]
    inner, word = (node.this, "not ") if isinstance(node, exp.Not) else (node, "")
    if not isinstance(inner, exp.In | exp.Is):
        return [node], []
    operands, signs = _chain(inner.this)
    if isinstance(inner, exp.Is):
        return [*operands, inner.expression], [*signs, f"{word}is"]
    values = inner.args.get("field") or exp.Tuple(expressions=inner.expressions)
    return [*operands, values], [*signs, f"{word}in"]
