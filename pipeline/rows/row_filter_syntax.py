"""Text of a row filter -> tree of sqlglot's expressions; ValueError for what is not in the language.

The language has Python's words (`==`, `None`, `x in [1, 2]`, `0 < x < 9`), as stored plans have. Its tokens are
listed here, and sqlglot's parser knows no function and no keyword besides them.
"""

import functools
import keyword
import re
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
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`")
# How operators of other languages are written here. The first one that an expression with an error has counts.
_FOREIGN = tuple((re.compile(pattern), hint) for pattern, hint in (
    (r"#|--|/\*", "remove the comment"),
    (r";", "write one expression, without ;"),
    (r"&", "write and instead of & and &&: a > 1 and b < 2"),
    (r"\|", "write or instead of | and ||: a > 1 or b < 2"),
    (r"!~", 'write not match(a, "PATTERN") instead of !~'),
    (r"=~|~\*|\S\s*~|(?i:\b(regexp\w*|rlike|similar\s+to|matches|match)\b\s*[^(\s])",
     'match(a, "PATTERN") finds a pattern of RE2'),
    (r"(?i:\bnot\s+(like|ilike|contains)\b)", 'not contains(a, "TEXT") finds text without a part'),
    (r"(?i:\bilike\b|\bicontains\b)", 'contains(lower(a), "text") ignores case'),
    (r"(?i:\b(like|glob|contains|includes|has)\b)", 'contains(a, "TEXT") finds a part, match(a, "^TEXT") a beginning'),
    (r"(?i:\bstarts_?with\b)", 'match(a, "^TEXT") finds a beginning'),
    (r"(?i:\bends_?with\b)", 'match(a, "TEXT$") finds an end'),
    (r"===", "write == instead of ==="),
    (r"!==|<>|\^=", "write != instead of !==, <> and ^="),
    (r"<=>", "write == instead of <=>"),
    (r"=>", "write >= instead of =>"),
    (r"=<", "write <= instead of =<"),
    (r"!(?!=)|~", "write not instead of ! and ~: not (a > 1)"),
    (r"(?<![=!<>])=(?!=)", "write == instead of ="),
    (r"(?i:\bbetween\b)", "write 1 <= a <= 3 instead of between"),
    (r"\b(AND|OR|NOT|IN|IS|And|Or|Not|In|Is)\b", "write and, or, not, in and is in lower case"),
    (r"(?i:\bis\s+(not\s+)?(null|missing|nan)\b|\b(isnull|notnull|isna|is_null)\b)",
     "write a is None or a is not None: it finds missing values"),
    (r"(?i:\bis\s+(not\s+)?(true|false)\b)", "write a == True or a == False"),
    (r"(?i:\bxor\b)", "write a != b instead of xor"),
    (r"\b(?:eq|EQ)\b", "write == instead of eq"), (r"\b(?:ne|NE|neq|NEQ)\b", "write != instead of ne"),
    (r"\b(?:gt|GT)\b", "write > instead of gt"), (r"\b(?:lt|LT)\b", "write < instead of lt"),
    (r"\b(?:ge|GE|gte|GTE)\b", "write >= instead of ge"), (r"\b(?:le|LE|lte|LTE)\b", "write <= instead of le"),
    (r"\*\*|\^|//|%|(?i:\b(mod|div)\b)", "the operators for numbers are + - * /"),
    (r"\?|(?i:\b(if|case|when)\b)", "there are no conditional expressions: write a > 1 or b > 2"),
    (r"^[^(\[{]*,", "write and instead of a comma: a > 1 and b < 2"),
    (r"\.\w+\(", "columns have no methods: lower(a), len(a)"),
    (r"\$\w|@\w|:\w", "write the name of a column as it is, or in backticks"),
))
_NAMES = {"true": "True", "false": "False", "null": "None", "none": "None", "nil": "None", "na": "None",
          "length": "len", "char_length": "len", "size": "len", "strlen": "len", "len": "len",
          "lcase": "lower", "casefold": "lower", "tolower": "lower", "lower": "lower", "upper": "lower",
          "ilike": "contains", "like": "contains", "instr": "contains", "contains": "contains",
          "regexp_like": "match", "regexp_matches": "match", "regexp": "match", "search": "match", "match": "match"}


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


def foreign_hint(text: str) -> str:
    """How an operator of another language is written here; "" if the text has none."""
    plain = _QUOTED.sub('""', text)
    return next((hint for pattern, hint in _FOREIGN if pattern.search(plain)), "")


def foreign_name(name: str) -> str:
    """How a word or function of another language is called here; "" if it is not known."""
    known = _NAMES.get(name.lower(), "")
    return f"write {known} instead of {name}" if known != name and known else ""


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
                           foreign_hint(text) or f'text goes into "quotes", unusual names into `backticks`; operators '
                           f"are {OPERATORS}") from None
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
            raise syntax_error(text, "has a comment", "remove the comment")
        if kind == TokenType.VAR and word in _WORDS:
            token = Token(_WORDS[word], word, token.line, token.col, token.start, token.end)
        elif kind == TokenType.VAR:
            after_number = last is not None and touches and last.token_type == TokenType.NUMBER
            if keyword.iskeyword(word) or not word.isidentifier() or after_number:
                raise syntax_error(text, f"cannot be read at {word!r}", foreign_hint(text) or
                                   f"numbers are decimal, other names go into `backticks`; operators are {OPERATORS}")
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
