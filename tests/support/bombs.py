"""Chat templates that take huge memory or time; each is to be refused."""

# ruff: noqa: E501

from __future__ import annotations

from typing import Final

_HUGE: Final = ("300000000", "99999999999", "2147483647", "1000000007")

#: Expressions that take much memory or time; N is a huge number.
_EXPRESSIONS: Final = [
    "'x'.center(N)", "'x'.ljust(N)", "'x'.rjust(N)", "'1'.zfill(N)", "('\\t' ~ 'x').expandtabs(N)",
    "'%Nd' % 1", "'%-Nd' % 1", "'%0Nd' % 1", "'%.Nf' % 1.5", "'%*d' % (N, 1)", "'%.*f' % (N, 1.5)",
    "'{:Nd}'.format(1)", "'{:<N}'.format('x')", "'{:.Nf}'.format(1.5)", "'{:>{w}}'.format('x', w=N)",
    "'%Nd'|format(1)", "'x'|center(N)", "'x\nx'|indent(N, true)", "('x' ~ 'y')|center(width=N)",
    "[1]|tojson(indent=N)", "'x' * N", "[0] * N", "N * 'x'", "N * [0]", "(1,) * N", "7 ** N", "2 ** N ** 9",
    "[1]|slice(N)|list|length", "[1]|batch(N, 'x')|list|length", "lipsum(n=N)", "lipsum(1, true, N, N + 1)",
    "range(N)|list|length", "('a' ~ 'b')|wordwrap(N)|center(N)",
]  # fmt: skip

#: What takes memory or time without a huge number.
_PROGRAMS: Final = [
    "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = OP %}{% endfor %}{{ ns.x }}".replace(
        "OP", operation
    )
    for operation in (
        "ns.x ~ ns.x", "ns.x + ns.x", "[ns.x, ns.x]|join", "ns.x|replace('x', 'xx')", "ns.x.replace('x', 'xx')",
        "ns.x.join([ns.x, ns.x])", "ns.x.join(ns.x)", "'%s%s' % (ns.x, ns.x)", "'{0}{0}'.format(ns.x)",
        "'%s%s'|format(ns.x, ns.x)", "(ns.x ~ ns.x)|upper", "(ns.x ~ ns.x).title()", "ns.x|list + ns.x|list",
        "[ns.x, ns.x]|tojson", "[ns.x, ns.x]|string", "ns.x.translate({120: 'xx'})", "[ns.x, ns.x]|pprint",
        "(ns.x, ns.x)|list|string", "(ns.x ~ ns.x)|urlencode", "ns.x|escape ~ ns.x|forceescape",
        "ns.x|replace('', 'ab')", "{'a': ns.x, 'b': ns.x}|xmlattr", "ns.x.replace('', 'xy')",
        "(ns.x ~ ns.x).split('')|join",
    )
] + [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
    "{% for a in [[[]]] recursive %}{{ loop([a, a]) }}{% endfor %}",
    "{% set x %}{% for a in range(99999) %}{% for b in range(999) %}xxxxxxxxxx{% endfor %}{% endfor %}{% endset %}",
    "{% filter upper %}{% for a in range(99999) %}{% for b in range(999) %}xxxxx{% endfor %}{% endfor %}{% endfilter %}",
    "{% for a in range(99999) %}{{ range(99999)|list|sum }}{% endfor %}",
    "{% for a in range(99999) %}{{ range(99999)|list|sort|unique|list|length }}{% endfor %}",
    "{% for a in range(99999) %}{{ 'x'.center(99999) }}{% endfor %}",
    "{% for a in range(99999) %}{{ ('a' * 99999)|wordcount }}{{ ('a ' * 49999)|urlize }}{% endfor %}",
    "{{ (('a' * 50000) ~ '@')|urlize }}{{ ((('(' * 50000) ~ 'http://a')|urlize) * 9999 }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "not " * 20000 + "1 }}",
    "{{ " + "-" * 60000 + "1 }}",
    "{{ [" * 3000 + "1" + "] }}" * 3000,
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "{% for x in [1] %}" * 900 + "{% endfor %}" * 900,
    "{{ 'x'" + " ~ 'x'" * 30000 + " }}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ raise_exception('x' * 100000) }}",
    "{{ strftime_now('%Y' * 50000) * 9 }}",
]  # fmt: skip

BOMBS: Final = [
    *("{{ " + each.replace("N", n) + " }}" for each in _EXPRESSIONS for n in _HUGE),
    *("{% set w = " + n + " %}{{ " + each.replace("N", "w") + " }}" for each in _EXPRESSIONS for n in _HUGE[:1]
      if "%N" not in each and ":N" not in each and "<N" not in each and ".N" not in each),
    *_PROGRAMS,
]  # fmt: skip
