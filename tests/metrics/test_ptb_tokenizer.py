"""The tokenizer against the Java one: a table that always runs, and Java itself where it is installed."""

import random
import shutil
import subprocess
from pathlib import Path

import pycocoevalcap
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

from mplug2_jax.metrics.ptb_tokenizer import tokenize
from tests.metrics.test_java_metrics import examples

# A text, and below it what Java said, its punctuation dropped.
SAID = """
A man can't (won't) say "hello" to John's dog.
a man ca n't -lrb- wo n't -rrb- say hello to john 's dog
It's gonna, gotta lemme gimme wanna-be.
it 's gon na got ta lem me gim me wanna-be
They cannot; 'tis and 'twas.
they can not 't is and 't was
£5 €6 ¢8 US$5 A$7 5% #1 #tag @user
# 5 $ 6 cents 8 us$ 5 a$ 7 5 % # 1 #tag @user
[x] {y} <b>bold</b> &amp; &lt; a & b AT&T R&B
-lsb- x -rsb- -lcb- y -rcb- <b> bold </b> & < a & b at&t r&b
a/b and/or 10/12/2014 2014-10-12 12:30pm 5pm 1,000.5 -5 +5 1.5.6
a/b and/or 10/12/2014 2014-10-12 12:30 pm 5pm 1,000.5 -5 +5 1.5.6
me@x.com http://www.x.com/a?b=c www.foo.com foo.org/bar pic.jpg.
me@x.com http://www.x.com/a?b=c www.foo.com foo.org/bar pic.jpg
Mr. Smith went to the U.S. today, e.g. by Main St.
mr. smith went to the u.s. today e.g. by main st.
It is no. No. 5 is. Corp.\tetc.
it is no no. 5 is corp. etc.
Vitamin C. The end. Plan B. works
vitamin c the end plan b. works
:-) :( ;D ^_^ <3
:--rrb- :-lrb- ;d ^_^ < 3
wait... wait… . . . -- --- ----- – — a--b a-b a – b !!! ?!
wait wait ----- a b a-b a b !!! ?!
“x” ‘y’ «w» it’s don’t ‚v a`b
x y w it 's do n't ‚ v a b
'80s 80's '90 rock 'n' roll 'em o'clock y'all goin'
'80s 80 's '90 rock 'n' roll 'em o'clock y' all goin
a_b _a C++ C# ** a*b café naïve 日本語 😀😀 ★ ™ °
a_b _ a c++ c# ** a * b café naïve 日本語 ★ ™ °
mid-20s 2.5-inch U.S.-based x-ray's open-faced 3-D 10-year-old
mid-20s 2.5-inch u.s.-based x-ray 's open-faced 3-d 10-year-old
(555) 555-5555 or 555-1234
-lrb-555-rrb-\u00a0555-5555 or 555-1234
2 1/2 ½ 3½
2\u00a01/2 1/2 3 1/2
-LRB- Yahoo! no!yes one.Two
-lrb- yahoo no!yes one.two
"""


PAIRS = list(zip(*[iter(SAID.strip("\n").split("\n"))] * 2, strict=True))


@pytest.mark.parametrize(("text", "tokens"), PAIRS)
def test_a_caption_has_the_tokens_of_java(text: str, tokens: str) -> None:
    assert tokenize(text) == tokens


def test_punctuation_has_no_tokens_and_line_breaks_are_spaces() -> None:
    assert tokenize("") == tokenize(" \n") == tokenize('... "." -- ;') == ""
    assert tokenize("a\nb\r\nc") == "a b c"


@given(st.text())
def test_tokens_have_no_spaces_and_no_dropped_marks(text: str) -> None:
    tokens = tokenize(text)
    assert not set(tokens.split(" ")) & set(PUNCTUATIONS)
    assert "  " not in tokens
    assert tokens.strip(" ") == tokens


def java_tokens(texts: list[str]) -> list[str]:
    """Return Java's tokens; a line between texts keeps them separate."""
    folder = Path(pycocoevalcap.__path__[0], "tokenizer")
    if not shutil.which("java"):
        pytest.skip("needs java on the path")
    command = ["java", "-cp", "stanford-corenlp-3.4.1.jar", "edu.stanford.nlp.process.PTBTokenizer"]
    lines = "".join(f"{text}\nx\n" for text in texts)
    done = subprocess.run(
        [*command, "-preserveLines", "-lowerCase"], input=lines.encode(), cwd=folder, capture_output=True, timeout=120
    )
    rows = done.stdout.decode().split("\n")[:-1:2]
    assert len(rows) == len(texts), done.stderr.decode()[-500:]
    return [" ".join(token for token in row.rstrip(" ").split(" ") if token not in PUNCTUATIONS) for row in rows]


PIECES = (
    "n't 's 're 'll 've 'd 'm gonna gotta lemme gimme wanna cannot 'tis 'twas 'em 'n' o'clock y'all Mr. Dr. U.S. e.g. "
    "a.m. St. Corp. etc. No. vs. Ph.D. http:// www. .com .org .jpg ... -- 1/2 10:30 1,000 $5 5% '80s 1980s :-) ;) </ "
    "<b> &amp; AT&T -LRB- T-shirt x-ray 3-D 2x4 555-1234 2014-10-12 5'10\" The A"
)
MARKS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~‘’“”«»‚„‹›–—―…éèüñçßøÅœ£€¢¥°½¼¾·•´×™®\xa0\xad‑"
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def fuzzed(rng: random.Random, words: list[str]) -> str:
    """Return half captions with marks on their words, half pieces and characters in random order."""
    pieces = PIECES.split()
    if rng.random() < 0.5:
        kinds = [
            lambda: rng.choice(words), lambda: rng.choice(words) + rng.choice(MARKS), lambda: rng.choice(pieces),
            lambda: rng.choice(MARKS) + rng.choice(words), lambda: rng.choice(words).upper(),
            lambda: rng.choice(words) + rng.choice(MARKS) + rng.choice(words),
        ]  # fmt: skip
        return " ".join(rng.choice(kinds)() for _ in range(rng.randint(1, 12)))
    sources = (pieces, words, MARKS, MARKS, ALPHABET, ALPHABET, "  ")
    return "".join(rng.choice(rng.choice(sources)) for _ in range(rng.randint(1, 12)))


def test_examples_and_fuzzed_lines_have_the_tokens_of_java() -> None:
    rng, captions = random.Random(0), [text for half in examples() for each in half.values() for text in each]
    words = sorted({word for text in captions for word in text.split()})
    texts = [*captions, *(text for text, _ in PAIRS), *(fuzzed(rng, words) for _ in range(2000))]
    wrong = [(t, java, tokenize(t)) for t, java in zip(texts, java_tokens(texts), strict=True) if tokenize(t) != java]
    assert not wrong
