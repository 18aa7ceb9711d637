"""The Penn Treebank tokens that caption metrics count: lower case, without punctuation.

Papers quote scores of captions tokenized by the COCO toolkit's Java program (Stanford CoreNLP 3.4.1's PTBTokenizer,
lower-casing, one caption per line). This is the same without Java, written from what that program does to texts, and
equal to it on hundreds of thousands of fuzzed lines of ASCII, Latin, Greek, Cyrillic, Hebrew, Arabic and CJK letters,
typographic quotes and dashes, fractions, currencies and HTML's lower-case entities. Known differences: South Asian
scripts, and letters added to Unicode since 2012, may be split elsewhere; Java reads all captions as one text, where the
period of a final abbreviation may depend on how the next caption begins ("No." before "5 dogs"), while here each
caption is separate; and a soft hyphen just before a contraction or an address may be treated differently.

A text is read from the left. Of the rules that match at a position, the one with the longest match, lookahead included,
yields the next token; the lookahead is left to the following tokens.
"""

import functools
import re
import unicodedata
from collections.abc import Callable

# Tokens that the toolkit drops. It lists brackets too, in upper case, which lower-cased tokens never equal: they stay.
_DROPPED = {"", "''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}


def _letters() -> str:
    """Return the letters and combining marks of the basic plane, as ranges of a character class."""
    kinds = ((p, unicodedata.category(chr(p))[0]) for p in range(0x10000))
    points = [p for p, kind in kinds if kind == "L" or (kind in "MS" and (0x2C2 <= p < 0x370 or 0x483 <= p < 0x700))]
    starts = [p for p, before in zip(points, [-1, *points[:-1]], strict=True) if p != before + 1]
    ends = [p for p, after in zip(points, [*points[1:], -1], strict=True) if p + 1 != after]
    return "".join(f"\\u{start:04x}-\\u{end:04x}" for start, end in zip(starts, ends, strict=True))


def _any_of(words: str) -> str:
    """Return a pattern of any of these words in any case, the longest first."""
    return f"(?ai:{'|'.join(sorted(words.split(), key=len, reverse=True))})"


_L = _letters()
_ACCENTED = "&[aeiouAEIOU](?:acute|grave|uml);"  # an accented letter of HTML
_WORD = f"(?:[{_L}\xad]|{_ACCENTED})(?:[{_L}\\d\xad]|{_ACCENTED})*"
_WORDS = f"{_WORD}(?:[.!?]{_WORD})*"  # words without a space after a period stay together
_APOSTROPHE = "(?:['\u2019\x92]|&apos;)"
_CURLY = "(?:[\u2019\x92]|&apos;)"
_QUOTE = "(?:['`\u2018\u2019\u201b\x91\x92]|&apos;)"  # characters read as an apostrophe inside a word
_HYPHENS = "[-_\u058a\u2010\u2011]"
_PART = f"(?:[dDoOlL]{_QUOTE}[{_L}\\d])?[{_L}\\d]+"  # of a word with hyphens; d'or, o'clock, l'eau
_HYPHENATED = f"{_PART}(?:{_HYPHENS}{_PART})*"
_INITIALS = r"[A-Za-z](?:\.[A-Za-z])+"
_COMPOUND = rf"[A-Za-z0-9][A-Za-z0-9.,\xad]*(?:-(?:{_INITIALS}\.|[A-Za-z0-9\xad]+))+"
_CAPITALS = "[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+"
_CLITIC = f"{_APOSTROPHE}(?ai:[msd]|re|ve|ll)"
_SPACE = "[ \t\xa0\n]"
_GAP = "[- \xa0]"  # between groups of a telephone number
_EYES = "-'<=>^~x"
_HOST = "[^ \t\n\f\r\"`'<>|.!?(){},-_$]+"  # ",-_" is a range, as in the original: no digits, no capitals, no hyphen
_WWW = '[^ \t\n\f\r"<>|.!?(){},]+'
_SITE = rf"(?:(?ai:www)\.(?:{_WWW}\.)+[a-zA-Z]{{2,4}}|(?:{_HOST}\.)+(?ai:com|net|org|edu))"
_PATH = '[^ \t\n\f\r"<>|()]+[^ \t\n\f\r"<>|.!?(){},\\-]'
_URL = '[^ \t\n\f\r"<>|(){}]+[^ \t\n\f\r"<>|.!?(){},\\-]'
_MAIL = '[^ \t\n\f\r"<>|(){}.\xa0]+'
_SENDER = '[a-zA-Z0-9][^ \t\n\f\r"<>|(){}\xa0]*'
_NAME = r"[A-Za-z][A-Za-z0-9:._\-]*"  # of a tag or its attribute
_VALUE = r"""(?:'[^'\r\n]*'|"[^"\r\n]*"|[A-Za-z0-9]+)"""
_ATTRIBUTE = f"{_NAME}(?: *= *{_VALUE})?"
_TAG = f"<(?:[!?][A-Za-z\\-][^>\r\n]*|{_NAME}(?: +{_ATTRIBUTE})* */?|/{_NAME}) *>"
_EXTENSIONS = _any_of(
    "bat bmp c class cgi cpp dll doc docx exe gif gz h htm html jar java jpg jpeg mov mp3 pdf php pl png ppt ps py sql "
    "tar txt wav x xml zip"
)
# Abbreviations whose next word is a name, and those that may end a sentence.
_TITLES = _any_of(
    "cf dr ft lt mr ms mt ph st vs wm adj adm adv ave cie col cpl det drs ens gen gov hon jos maj mme mrs pfc pvt rep "
    "rev sen sfc sgt spc ste alex asst atty brig capt cmdr dept elec govs insp invt mlle msgr natl pres prof reps sens "
    "supt assoc comdr lieut messrs"
)
_ENDING = _any_of(
    "al co ct ga jr ky md mo rd rt sq sr va vt ala apr aug bhd cos dak dec esq est etc ext feb fla fri inc ind jan jul "
    "jun kan ltd mar mon neb nev nov oct plc sep seq sys tel thu tue wed wis wyo ariz assn bldg blvd bros calif colo "
    "conn corp intl kans mich minn mont okla penn sept tenn thurs tues univ wisc ph\\.d"
)
# Words that are abbreviations in these cases only.
_CASED = (
    "A[Zz]|[LP][Aa]|A[Rr][Kk]|D[Ee][Ll]|I[Ll][Ll]|O[Rr][Ee]|T[Ee][Xx]|M[AaIi][Ss][Ss]|W[Aa][Ss][Hh]|P?[Pp][Tt][ey]s?"
)
# Abbreviations before a number.
_NUMBERED = _any_of("no nos fig figs prop op pp art ca")
# The period after a capital letter ends a sentence before these words.
_STARTS = "(?=[A-Z])" + _any_of(
    "a about according additionally after an as at but earlier he her here however if in it last many more mr\\. ms\\. "
    "now once one other our she since so some such that the their then there these they this we what when while yet you"
)

# Characters that are tokens by themselves; other characters that match no rule are dropped.
_SYMBOLS = (
    "!-/:-@\\[-`{-~\x80¡-©¬®-´¶-¹¼-¿×÷\u037e\u0387\u0589\u05be\u05c0\u05c3\u05c6\u05f3\u05f4\u0600-\u0603\u0606-\u060c\u0614"
    "\u061b\u061e\u061f\u066a\u066d\u06d4‖‗‚„-‣‰-‸※‾-⁂⁄⁰⁴-⁾₀-₎₠₤€℀℁℃-℆℈℉℔№-℘℞-℣℥℧℩℮℺℻⅀-⅄⅊-⅍⅏⅓-⅞←-⒵ⓐ-⯿、。〒・"
    "！-／：-＠［-｀｛-･￠￡￥￦"
)

# Name, token, and lookahead. Of rules with equally long matches, the first wins.
_RULES = (
    ("tag", _TAG, ""),
    ("two", "(?ai:can)", "(?ai:not)"),
    ("two_na", "(?ai:gon|wan)", "(?ai:na)"),
    ("two_ta", "(?ai:got)", "(?ai:ta)"),
    ("two_me", "(?ai:gim|lem)", "(?ai:me)"),
    ("it", "'(?ai:t)", "(?ai:is|was)"),
    ("word", _WORD, ""),
    ("negated", "[A-Za-z\xad]*[A-MO-Za-mo-z\xad]", f"(?ai:n){_QUOTE}(?ai:t)"),
    ("owner", _WORDS, _CLITIC),
    ("hyphenated", _HYPHENATED, ""),
    ("negation", f"(?ai:n){_QUOTE}(?ai:t)", ""),
    ("clitic", _CLITIC, "[^A-Za-z]"),
    ("curly_clitic", f"{_CURLY}(?ai:[msd]|re|ve|ll)", ""),
    ("slashed", r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}", ""),
    ("capitals", _CAPITALS, ""),
    ("number", r"[-+]?(?:\d+(?:[.:,\xad\u066b\u066c]\d+)*|(?:[.:,\xad\u066b\u066c]\d+)+)", ""),
    ("date", r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}", ""),
    ("fraction", rf"(?:\d{{1,4}}{_GAP})?\d{{1,4}}(?:\\?/|\u2044)\d{{1,4}}", ""),
    ("url", f"(?ai:https?)://{_URL}", ""),
    ("host", _SITE, ""),
    ("page", f"{_SITE}/{_PATH}", ""),
    ("mail", rf"(?:<|&lt;)?{_SENDER}@(?:{_MAIL}\.)*{_MAIL}(?:>|&gt;)?", ""),
    ("handle", "@[A-Za-z_][A-Za-z_0-9]*", ""),
    ("hashtag", f"#(?:[{_L}\xad]|{_ACCENTED})+", ""),
    ("dollars", r"[A-Z]*\$", ""),
    ("clipped", f"(?ai:{_APOSTROPHE}(?:n{_APOSTROPHE}|em|till?|cause)|(?:[ldj]|dunkin|somethin|ol){_APOSTROPHE})", ""),
    ("come_on", f"(?ai:c{_APOSTROPHE}mon)", ""),
    ("curly_n", f"{_CURLY}(?ai:n)", ""),
    ("and", f"{_APOSTROPHE}(?ai:n)", _SPACE),
    ("you", f"(?ai:y){_APOSTROPHE}", f"[{_L}]"),
    ("inner_vowel", f"[{_L}]+[aeiouyAEIOUY]{_QUOTE}[aeiouA-Z][{_L}]*", ""),
    ("inner_capital", f"[A-HJ-XZn]{_QUOTE}[{_L}]{{2,}}", ""),
    ("wide_eyes", f"[oO]{_QUOTE}[oO]", ""),
    ("decade", f"{_APOSTROPHE}[2-9]0s", ""),
    ("year", rf"{_APOSTROPHE}\d\d", _SPACE),
    ("special", f"S&(?:P-500|Ls)|(?ai:cap{_APOSTROPHE}n|c{_APOSTROPHE}est|li'l|pro-|anti-)|-[LR][RCS]B-", ""),
    ("words", _WORDS, ""),
    ("title", rf"(?:{_TITLES}|[Mm][FfTt][Gg])\.", ""),
    ("ending", rf"(?:{_ENDING}|{_CASED})\.", "(?s:.{0,2})"),
    ("numbered", rf"{_NUMBERED}\.", r"[ \t]?\d"),
    ("initial", r"[A-Za-z]\.", ""),
    ("last_initial", "[A-Za-z]", rf"\.{_SPACE}+(?:{_STARTS}|{_TAG})[ \t\n]"),
    ("initials", rf"{_INITIALS}\.?", ""),
    ("with_stop", rf"(?:{_WORDS}|{_HYPHENATED}|{_COMPOUND}|{_CAPITALS})\.", "[,;:]"),
    ("compound", _COMPOUND, ""),
    ("file", rf"[{_L}\d]+(?:\.[{_L}\d]+)*\.{_EXTENSIONS}", "[ \t\n!,.?]"),
    ("phone", rf"\+{{0,2}}(?:\d{{2,4}}{_GAP}){{1,2}}\d{{3,4}}{_GAP}?\d{{3,5}}", ""),
    ("area_phone", rf"\(\d{{2,3}}\)[ \xa0]?\d{{3,4}}{_GAP}?\d{{3,5}}", ""),
    ("dotted_phone", r"(?:\+{0,2}\d{2,4}\.)?\d{2,4}\.\d{3,4}\.\d{3,5}", ""),
    ("smiley", r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]", "[^A-Za-z0-9]"),
    ("face", rf"[{_EYES}]_[{_EYES}]|\([{_EYES}][_.]?[{_EYES}]\)|\((?!-)[{_EYES}]-(?!-)[{_EYES}`]\)", ""),
    ("marks", r"[?!]+|\\\*|\*+|@+|_+|#+|''|<<|>>|[²³¹⁰⁴-⁾]+|[₀-₎]+", ""),
    ("dash", "-{2,}|[\u2013-\u2015\x96\x97]+|&(?ai:[mn]dash);", ""),
    ("dots", r"\.{3,}|\.(?:[ \xa0]\.){2,}|[…\x85]", ""),
    ("language", r"[Cc]\+\+|[CcFf]#", ""),
    ("entity", r"&(?:(?ai:lt|gt|amp|quot|nbsp|apos)|#\d+);", ""),
    ("quotes", "[`\u2018-\u201f‹›«»\x91-\x94]{1,2}", ""),
    ("space", r"[ \t\xa0\n]+", ""),
    ("symbol", f"[{_SYMBOLS}]", ""),
    ("unknown", "(?s:.)", ""),
)
# A fast path for most words: letters before a space, unless they are two words in one.
_PLAIN = re.compile("(?!(?ai:cannot|gonna|gotta|lemme|gimme|wanna)[ \n])([A-Za-z]+)(?=[ \n])[ \t\xa0\n]+")

_SYMBOL_NAMES = {
    "(": "-LRB-", ")": "-RRB-", "[": "-LSB-", "]": "-RSB-", "{": "-LCB-", "}": "-RCB-",
    "£": "#", "€": "$", "\x80": "$", "¤": "$", "₠": "$", "¢": "cents",
    "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", '"': "''",
}  # fmt: skip
_QUOTES = {
    **dict.fromkeys("‘‛‹\x91", "`"), **dict.fromkeys("’›\x92", "'"),
    **dict.fromkeys("“«\x93", "``"), **dict.fromkeys("”»\x94", "''"),
}  # fmt: skip
_ENTITIES = {"&lt;": "<", "&gt;": ">", "&amp;": "&", "&quot;": "''", "&apos;": "'", "&nbsp;": ""}


@functools.cache
def _lexer() -> re.Pattern[str]:
    """Return one pattern that tries every rule: its first group is the match with lookahead, its second the token.

    Compiled on first use, because that takes longer than importing all other metrics.
    """
    return re.compile("".join(f"(?:(?=(({token}){after}))|)" for _, token, after in _RULES))


def _straighten_apostrophes(token: str) -> str:
    return re.sub(_APOSTROPHE, "'", re.sub("[‘‛]", "`", token))


def _name_brackets(token: str) -> str:
    """Replace round brackets by their names; only smileys and telephone numbers contain any."""
    return token.replace("(", "-LRB-").replace(")", "-RRB-")


def _normalize_dash(token: str) -> str:
    return token if token[0] == "-" and len(token) > 4 else "--"


_NORMALIZERS: dict[str, Callable[[str], str]] = {
    "space": lambda token: "",
    "unknown": lambda token: "",
    "symbol": lambda token: _SYMBOL_NAMES.get(token, token),
    "quotes": lambda token: "".join(_QUOTES.get(c, c) for c in token),
    "entity": lambda token: _ENTITIES.get(token.lower(), token),
    "dots": lambda token: "...",
    "dash": _normalize_dash,
    "clitic": _straighten_apostrophes,
    "curly_clitic": _straighten_apostrophes,
    "negation": _straighten_apostrophes,
    "capitals": lambda token: token.replace("&amp;", "&"),
    "smiley": _name_brackets,
    "face": _name_brackets,
    "area_phone": _name_brackets,
}
_KEEPS_SOFT_HYPHENS = {"url", "mail", "hashtag"}


def tokenize(caption: str) -> str:
    """Return the caption's tokens, separated by spaces.

    A space inside a token, as in "2 1/2", becomes a no-break space, at which ``str.split()`` still splits.

    Example:
        >>> tokenize("A man can't ride (two) horses!")
        "a man ca n't ride -lrb- two -rrb- horses"
    """
    text = re.sub("[\r\f\v\u2028\u2029]", " ", caption) + "\n"
    tokens, at = [], 0
    while at < len(text):
        if plain := _PLAIN.match(text, at):
            at = plain.end()
            tokens.append(plain[1].lower())
            continue
        match = _lexer().match(text, at)
        assert match
        rule = max(range(len(_RULES)), key=lambda i: match.end(2 * i + 1))
        name, token = _RULES[rule][0], match[2 * rule + 2]
        at += len(token)
        token = _NORMALIZERS.get(name, str)(token if name in _KEEPS_SOFT_HYPHENS else token.replace("\xad", ""))
        tokens.append(token.replace(" ", "\xa0").lower())
    return " ".join(token for token in tokens if token not in _DROPPED)
