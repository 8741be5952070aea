"""The plain notation of the formulas' docstrings, as LaTeX.

``dx = dy y (1 - y)``, ``r = 1 / √(Σ x_j² / n + ε)``, ``∂y_j/∂x_i = y_j ([i = j] - y_i)``. The
grammar is small and strict: what it does not know is no mathematics, and is shown as it stands.

    statement   relation, with words and commas between relations
    relation    sum = sum <= sum ...
    sum         term + term - term ...
    term        factors side by side, · or ∘ between them, and quotients
    factor      a name, a number, a bracket, a root, a sum's sign; then indices and powers

A slash without spaces divides what touches it, ``x/3``. One between spaces divides the whole term.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "varepsilon", "ζ": "zeta",
    "η": "eta", "θ": "theta", "κ": "kappa", "λ": "lambda", "μ": "mu", "ν": "nu", "ξ": "xi",
    "π": "pi", "ρ": "rho", "σ": "sigma", "τ": "tau", "φ": "varphi", "χ": "chi", "ψ": "psi",
    "ω": "omega", "Γ": "Gamma", "Δ": "Delta", "Θ": "Theta", "Λ": "Lambda", "Σ": "sum",
    "Π": "prod", "Φ": "Phi", "Ω": "Omega",
}  # fmt: skip
POWERS = {"²": "2", "³": "3", "ᵀ": r"\mathsf{T}", "⁺": "+", "⁻": "-", "ᵗ": "t", "⁴": "4"}
RELATIONS = {
    "=": "=", "<=": r"\le", ">=": r"\ge", "<": "<", ">": ">", "!=": r"\ne", "≈": r"\approx",
    "←": r"\leftarrow", "->": r"\to", "~": r"\sim", "≤": r"\le", "≥": r"\ge",
}  # fmt: skip
SIGNS = {"+": "+", "-": "-", "−": "-", "-+": r"\mp", "±": r"\pm"}
TIMES = {"·": r"\cdot", "∘": r"\circ", "×": r"\times"}
BRACKETS = {"(": ")", "[": "]", "⌈": "⌉", "‖": "‖", "|": "|", "<": ">"}
DRAWN = {
    "⌈": r"\lceil ", "⌉": r"\rceil ", "‖": r"\Vert ", "|": r"\vert ", "<": r"\langle ",
    ">": r"\rangle ",
}  # fmt: skip
FUNCTIONS = {
    "log", "log1p", "exp", "tanh", "cos", "sin", "max", "min", "sign", "erf", "erfc", "softmax",
    "softplus", "sigmoid", "relu", "elu", "gelu", "silu", "hardsigmoid", "clip", "diag", "Var",
    "lse", "layer_norm", "rms_norm",
}  # fmt: skip
#: a gradient, dL/dx for x, and a tangent
GRADIENT = re.compile(r"d(?=[A-Zabfghklnpqrstvwxyz](?:[gdu])?$|lse$)")
TANGENT = re.compile(r"t(?=[A-Zabhklnpqsvwxy](?:[gdu])?$)")
#: in a formula these are words, whatever they could be
WORDS = {
    "or", "and", "with", "where", "else", "of", "in", "on", "by", "to", "if", "is", "as", "at",
    "an", "the",
}  # fmt: skip

_TOKEN = re.compile(
    r"""(?P<space>\s+)
    |(?P<number>\d+(?:\.\d+)?(?:e-?\d+)?)
    |(?P<name>(?:layer_norm|rms_norm|[A-Za-z]+\d?p?(?![A-Za-z]))\u0302?|[α-ωΑ-Ω]\u0302?)
    |(?P<index>[₀-₉]+|_(?:\{[^}]*\}|\([^)]*\)|[A-Za-z0-9α-ω]+))
    |(?P<power>[²³ᵀ⁺⁻ᵗ⁴]+)
    |(?P<mark><=|>=|!=|->|-\+|\.\.\.|.)""",
    re.VERBOSE | re.DOTALL,
)


class NotMathematics(ValueError):
    """Text that the grammar does not know."""


class Token(NamedTuple):
    kind: str
    text: str
    start: int
    end: int
    #: whether white space stands before it
    apart: bool


def tokens(text: str) -> list[Token]:
    found, apart = [], False
    for m in _TOKEN.finditer(text):
        kind = m.lastgroup or ""
        if kind == "space":
            apart = True
            continue
        found.append(Token(kind, m[0], m.start(), m.end(), apart))
        apart = False
    return found


@dataclass
class Part:
    """A factor or a term. ``inside`` is what a pair of round brackets has in it."""

    latex: str
    inside: str | None = None
    sums: bool = False


class Reader:
    """Reads mathematics from tokens, from ``at`` on. Each method reads as much as it can, and
    raises :class:`NotMathematics` if that is nothing."""

    def __init__(self, found: list[Token], at: int = 0, *, words: bool = False) -> None:
        self.tokens, self.at, self.words = found, at, words
        self.closing: list[str] = []
        self.raised = 0  # how many powers it stands in

    def peek(self, ahead: int = 0) -> Token:
        i = self.at + ahead
        end = self.tokens[-1].end if self.tokens else 0
        return self.tokens[i] if i < len(self.tokens) else Token("end", "", end, end, True)

    def take(self) -> Token:
        token = self.peek()
        self.at += 1
        return token

    def is_word(self, ahead: int = 0) -> bool:
        """Whether the token is a word of English."""
        token = self.peek(ahead)
        if token.kind != "name" or token.text in FUNCTIONS:
            return False
        if token.text in WORDS:
            return True
        if token.text == "a":  # an article, if a word follows it
            return self.is_word(ahead + 1) and self.peek(ahead + 1).text not in WORDS
        return self.variable(token.text) is None

    def variable(self, name: str) -> str | None:
        """A name as LaTeX, or None if it is none."""
        bare = name.removesuffix("\u0302")
        if bare in GREEK:
            latex = rf"\{GREEK[bare]}"
        elif bare == "delta":
            latex = r"\delta"
        elif len(bare) == 1:
            latex = bare
        elif re.fullmatch("[Wb][gdu]", bare):
            latex = f"{bare[0]}_{bare[1]}"
        elif m := GRADIENT.match(bare):
            latex = rf"\operatorname{{d}}\!{self._of(bare[m.end() :])}"
        elif m := TANGENT.match(bare):
            latex = rf"\dot{{{self._of(bare[m.end() :])}}}"
        else:
            return None
        return rf"\hat{{{latex}}}" if bare != name else latex

    def _of(self, name: str) -> str:
        return r"\operatorname{lse}" if name == "lse" else self.variable(name) or name

    def statement(self) -> str:
        """Relations, with words and commas between them, up to a closing bracket or the end."""
        parts: list[str] = []
        while self.peek().kind != "end" and self.peek().text != self._close():
            token = self.peek()
            if token.text in (",", ";", ":"):
                self.take()
                if parts and parts[-1].endswith(" }"):  # no space between a word and its comma
                    parts[-1] = f"{parts[-1][:-2]}}}"
                parts.append(token.text + (r"\; " if not self.closing else " "))
            elif self.words and self.is_word():
                words = [self.take().text]
                while self.is_word():
                    words.append(self.take().text)
                parts.append(rf"\text{{ {' '.join(words)} }}")
            else:
                parts.append(self.relation())
        if not parts:
            raise NotMathematics("nothing")
        return "".join(parts)

    def _close(self) -> str:
        return self.closing[-1] if self.closing else ""

    def relation(self) -> str:
        latex = ""
        if self.peek().text in RELATIONS and self.peek().text not in ("<", ">"):
            latex = f"{RELATIONS[self.take().text]} "
        latex += self.sum()
        while self.peek().text in RELATIONS and self.peek().text != self._close():
            start = self.at
            sign = RELATIONS[self.take().text]
            try:
                latex += f" {sign} {self.sum()}"
            except NotMathematics:
                self.at = start
                break
        return latex

    def sum(self) -> str:
        latex = f"{SIGNS[self.take().text]}" if self.peek().text in SIGNS else ""
        latex += self.term().latex
        while self.peek().text in SIGNS:
            start = self.at
            sign = SIGNS[self.take().text]
            try:
                latex += f" {sign} {self.term().latex}"
            except NotMathematics:
                self.at = start
                break
        return latex

    def term(self) -> Part:
        whole = self.touching()
        while True:
            start, token = self.at, self.peek()
            try:
                if token.text in TIMES:
                    self.take()
                    whole = Part(f"{whole.latex} {TIMES[token.text]} {self.touching().latex}")
                elif token.text == "/" and (token.apart or self.peek(1).apart):
                    self.take()
                    below = self.touching()
                    if below.sums:
                        below = Part(f"{below.latex} {self.term().latex}")
                    whole = Part(self._quotient(whole, below))
                elif self._starts_factor() and token.apart:
                    if token.kind == "number" and self.peek(1).text != "^":
                        return whole
                    if token.text == "(" and self.tokens[self.at - 1].text in FUNCTIONS:
                        return whole  # a remark
                    sums = whole.sums
                    part = self.touching()
                    gap = " " if sums else r"\,"
                    whole = Part(f"{whole.latex}{gap}{part.latex}", sums=part.sums)
                else:
                    return whole
            except NotMathematics:
                self.at = start
                return whole

    def touching(self) -> Part:
        """Factors with no space between them, as 2β, and a quotient of two such."""
        whole = self.factor()
        while self._starts_factor() and not self.peek().apart:
            part = self.factor()
            whole = Part(f"{whole.latex} {part.latex}", sums=part.sums)
        if self.peek().text == "/" and not self.peek().apart and not self.peek(1).apart:
            start = self.at
            self.take()
            try:
                below = self.factor()
                while self._starts_factor() and not self.peek().apart:
                    below = Part(f"{below.latex} {self.factor().latex}")
                whole = Part(self._quotient(whole, below))
            except NotMathematics:
                self.at = start
        return whole

    def _starts_factor(self) -> bool:
        token = self.peek()
        if token.text == self._close() or token.text == "<":
            return False
        if token.kind == "name":
            return not self.is_word()
        return token.kind == "number" or token.text in (*"([⌈‖|√∂∞½ℓ", "...")

    def factor(self) -> Part:
        token = self.peek()
        if token.kind == "name":
            part = self._name()
        elif token.kind == "number":
            part = Part(self._number())
        elif token.text == "√":
            self.take()
            under = self.factor()
            return Part(rf"\sqrt{{{under.latex if under.inside is None else under.inside}}}")
        elif token.text == "∂":
            self.take()
            return Part(rf"\partial {self.factor().latex}")
        elif token.text in BRACKETS:
            part = self._bracket()
        elif token.text in ("∞", "...", "½", "ℓ"):
            names = {"∞": r"\infty", "...": r"\ldots", "½": r"\tfrac{1}{2}", "ℓ": r"\ell"}
            part = Part(names[self.take().text])
        else:
            raise NotMathematics(f"{token.text!r}")
        return self._indexed(part)

    def _name(self) -> Part:
        if self.is_word():
            raise NotMathematics(self.peek().text)
        name = self.take().text
        if name in FUNCTIONS:
            return Part(rf"\operatorname{{{name.replace('_', ' ')}}}")
        latex = self.variable(name)
        assert latex is not None  # else it is a word
        return Part(latex, sums=latex in (r"\sum", r"\prod"))

    def _number(self) -> str:
        text = self.take().text
        if "e" not in text:
            return text
        number, power = text.split("e")
        return (rf"{number} \cdot " if number != "1" else "") + f"10^{{{power}}}"

    def _bracket(self) -> Part:
        opening = self.take().text
        self.closing.append(BRACKETS[opening])
        try:
            inside = self.statement()
            if self.peek().text != BRACKETS[opening]:
                raise NotMathematics(f"{opening} is not closed")
            closing = self.take().text
        finally:
            self.closing.pop()
        tall = any(sign in inside for sign in (r"\frac", r"\sqrt", r"\left"))
        left, right = (DRAWN.get(b, b) for b in (opening, ">" if opening == "<" else closing))
        latex = rf"\left{left}{inside}\right{right}" if tall else f"{left}{inside}{right}"
        return Part(latex, inside if opening == "(" else None)

    def _indexed(self, part: Part) -> Part:
        """The factor with its indices, powers and primes."""
        below, above, primes = "", "", ""
        latex = part.latex
        while True:
            token = self.peek()
            if token.apart or token.kind == "end":
                break
            if token.kind == "index" and not below:
                below = _index(self.take().text)
            elif token.kind == "power":
                above += "".join(POWERS[c] for c in self.take().text)
            elif token.text == "'":
                if self.peek(1).kind == "name" and not self.peek(1).apart:
                    break  # a genitive
                self.take()
                primes += "'"
            elif token.text == "^" and not above:
                self.take()
                above = self._power()
            else:
                break
        if not (below or above or primes):
            return part
        if "_" in latex and below:  # W_d with another index
            latex = f"{{{latex}}}"
        latex += f"_{{{below}}}" if below else ""
        if primes and above:
            latex += rf"^{{{len(primes) * chr(0x5C) + 'prime '}{above}}}"
        elif above:
            latex += f"^{{{above}}}"
        return Part(latex + ("" if above else primes), sums=part.sums)

    def _quotient(self, above: Part, below: Part) -> str:
        if self.raised:
            return f"{above.latex}/{below.latex}"
        a, b = (p.latex if p.inside is None else p.inside for p in (above, below))
        return rf"\frac{{{a}}}{{{b}}}"

    def _power(self) -> str:
        sign = "-" if self.peek().text == "-" and not self.peek().apart else ""
        if sign:
            self.take()
        token = self.peek()
        if token.apart:
            raise NotMathematics("a power of nothing")
        if token.text in ("(", "|"):
            self.raised += 1
            part = self._bracket()
            self.raised -= 1
            return sign + (part.latex if part.inside is None else part.inside)
        if token.kind == "number":
            return sign + self.take().text
        return sign + self._name().latex


def _index(text: str) -> str:
    if text[0] != "_":
        return "".join(str("₀₁₂₃₄₅₆₇₈₉".index(c)) for c in text)
    text = text[1:]
    if text[0] in "{(":
        try:
            return translated(text[1:-1], words=True)
        except NotMathematics:
            return rf"\text{{{text[1:-1]}}}"
    if len(text) >= 4:
        return rf"\text{{{text}}}"
    return "".join(rf"\{GREEK[c]} " if c in GREEK else c for c in text)


def translated(text: str, *, words: bool = False) -> str:
    """``text``, all of it, as LaTeX. With ``words`` it may have words between its formulas.

    Raises:
        NotMathematics: it is none, or something in it is none.
    """
    reader = Reader(tokens(text), words=words)
    latex = reader.statement()
    if reader.peek().kind != "end":
        raise NotMathematics(f"{reader.peek().text!r} in {text!r}")
    return latex


#: what makes a formula of a few letters: an article or a number is none
_SIGNIFICANT = re.compile(
    r"[=≤≥≈←<>_^∂√Σ²³ᵀ‖∘∞|₀-₉]|[α-ωΑ-Ω]|\u0302|[a-zA-Z]\(|[a-z]'|\w \w|\w/\w|[\w)] [-+·/] [\w(]"
    r"|^-\w|^\[\w|^(?:\w )?\(\S+, "
)


def inline(text: str, *, names: bool = True) -> list[tuple[str, bool]]:
    """Prose, cut into (piece, whether it is mathematics). Mathematics is as LaTeX. Without
    ``names`` a name alone is none."""
    found = tokens(text)
    pieces: list[tuple[str, bool]] = []
    last = at = 0
    while at < len(found):
        token = found[at]
        before = found[at - 1] if at else token
        opens = (
            token.apart or at == 0 or before.text in "([|" or (before.text == "-" and before.apart)
        )
        reader = Reader(found, at)
        try:
            latex = reader.relation() if opens else ""
        except NotMathematics:
            latex = ""
        end = found[reader.at - 1].end if latex else 0
        if latex and _is_formula(text[token.start : end], text[end : end + 2], names):
            pieces += [(text[last : token.start], False), (latex, True)]
            last, at = end, reader.at
            continue
        at += 1
    pieces.append((text[last:], False))
    return [(piece, mathematics) for piece, mathematics in pieces if piece]


def _is_formula(source: str, following: str, names: bool) -> bool:
    if re.match(r"[\w^`]|-\w", following) or source[0] in "<>=":
        return False
    if source.startswith(("a ", "I ", "A ")) and not re.match(r"\w [-=<>+·/^←]", source):
        return False
    if re.fullmatch(r"[b-zB-HJ-Z]|d[xyqkvwWbPsztaphnrlL]|t[xyqkvw]", source):
        return names
    if (
        source == "n/a"
        or source in FUNCTIONS
        or re.fullmatch(r"[-()\[\]\d.,/\s]+|[A-Za-z]+", source)
    ):
        return False
    return bool(_SIGNIFICANT.search(source))
