"""Wiki markup of the sample becomes the text of an encyclopedia."""

import hashlib

import pytest

from infini_retrofit.texts.articles import read_gensim_sample
from infini_retrofit.texts.wikimarkup import clean_article, render_template

SAMPLE_TEXT = "c7669dc37dba404eab8c9370d6f44d495d6998d5267f2b24138c25dce36f8e7c"

def test_the_sample_is_byte_for_byte_the_text_of_the_published_numbers():
    sample = read_gensim_sample()
    assert all(article.text.startswith(article.title + "\n\n") for article in sample)
    assert len(sample) == 98
    text = "\0".join(f"{article.title}\1{article.text}" for article in sample)
    assert hashlib.sha256(text.encode()).hexdigest() == SAMPLE_TEXT


def test_markup_becomes_an_encyclopedia():
    markup = """{{Infobox|name=''X''|map={{small|[[a|b]]}}}}
[[File:Map.png|thumb|A [[map]] of {{lang|la|X}}]]
'''X''' ({{IPA-el|x|pron}}; {{lang-el|\u03c7}}, ''khi'')<ref name="a">Not {{cite|x}}.</ref> is the
[[letter (alphabet)|letter]]s' friend ( {{respell|EKS}} , ) &mdash; 10<sup>6</sup>&nbsp;
km<sup>2</sup> .
<!-- no one
sees this -->
{| class="wikitable"
|-
| cell || {{flag|Y}}
|}
== ''Uses'' ==
{{Main|Uses of X}}
* as in <math>x^{{2}}</math>
* [http://example.org the site], H<sub>2</sub>O
** {{cite book|title=Gone}}

: one line<br />next line
=== Empty ===
== Table only ==
The numbers are:
{| x
|}
== References ==
{{Reflist}}
=== Books ===
* A book
== After ==
''Iliad'''s hero."""
    assert clean_article(markup) == (
        "X (\u03c7, khi) is the letters' friend \u2014 10^6 km\u00b2.\n\n"
        "Uses\n\n"
        "- as in $x^{ {2} }$\n- the site, H2O\n\n"
        "one line\nnext line\n\n"
        "After\n\n"
        "Iliad's hero."
    )


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("convert|5|to|10.5|km2|sqmi|0|abbr=on", "5 to 10.5 km\u00b2"),
        ("convert|5|ft|11|in|cm", "5 ft 11 in"),
        ("val|6.24|e=18|u=C", "6.24\u00d710^18 C"),
        ("As of|2015|6|30", "As of 30 June 2015"),
        ("nihongo|'''Aikido'''|\u5408|Aikid\u014d", "'''Aikido''' (\u5408, Aikid\u014d)"),
        ("coord|13|19|N|169|9|W|type:event", "13\u00b019'N 169\u00b09'W"),
        ("coord|32.7|-86.7|display=title", ""),
        ("lang-ru|link=no|text", "text"),
        ("quote|text=Words = deeds.", "\n\nWords = deeds.\n\n"),
        ("Infobox country|name=X|text", ""),
    ],
)
def test_a_template_shows_what_a_reader_sees(body, text):
    assert render_template(body) == text
