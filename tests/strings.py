# ruff: noqa: E501, RUF001
"""500 texts that reveal differences between tokenizers, the same on every machine."""

import random

WORDS = """a photo of the red cat; Two DOGS on GRASS; don't; they're; we've; I'm; she'd; he'll; it's the cat's; o'clock;
'quoted'; rock'n'roll; 'tis; the '90s; cats' toys; CAN'T STOP; mother-in-law; state-of-the-art; e.g. this; U.S.A.;
snake_case_name; camelCaseName; C++ and C#; AT&T; R&B; 50% off; $9.99; #hashtag @mention; a/b; and/or; x^2 + y_1 = z;
(parentheses) [brackets] {braces}; <b>bold</b>; a < b > c; ...; ?!?!; -- dashes --; *stars*; ~tilde~; back\\slash; `code`;
i; I; .; ,; -; !; ?; '; "; ''; antidisestablishmentarianism; Donaudampfschifffahrtsgesellschaft; supercalifragilistic;
iPhone 15 Pro; COVID-19; mRNA; H2O; 3D; 4K TV; B2B; 1st 2nd 3rd""".replace("\n", " ").split("; ")
NUMBERS = """0; 7; 42; 007; 3.14159; 1,000,000; -273.15; 6.02e23; 0xFF; 1/2; 12:30; 2026-11-25; +1 (555) 010-9999; 192.168.0.1;
100000000000000000000; Ⅷ; ½ cup; ²; ①; ٣٤٥; १२३; 五百; ３７; 1️⃣""".replace("\n", " ").split("; ")
URLS = """http://example.org; https://example.org/a/b?c=d&e=f#g; www.example.com; user@example.com; ftp://host:21/x;
file.tar.gz; C:\\dir\\file.txt; /usr/bin/env; photo_2026-11-25.JPG; data:text/plain,hi; https://例え.jp/パス""".replace(
    "\n", " "
).split("; ")
EMOJI = ["😀", "🐱", "❤️", "❤", "👍🏽", "👩‍🚀", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "🇺🇳🇯🇵", "🧑🏿‍🤝‍🧑🏻", "a 🐶 and a 🐱!", "😀😀😀", "✈️ to 🗼", "☺", "♥♦", "🤷🏼‍♀️", "🫠", "©®™"]  # fmt: skip
CJK = ["一只猫的照片", "两只红色的狗，在草地上。", "北京市朝阳区", "你好！世界", "「引号」", "３６０度", "日本語のテキスト", "カタカナとｶﾀｶﾅ",
       "ﾊﾞｶ", "東京タワー　夜景", "猫 cat 狗 dog", "한국어 문장", "한글", "𠮷野家", "㈱", "〇一二", "ー", "你好,world", "蓝色汽车2026年", "ＦＵＬＬ　ｗｉｄｔｈ"]  # fmt: skip
OTHERS = ["это кошка и Собака", "ЁЖИК", "Ελληνικά ΟΔΟΣ", "ΣΊΣΥΦΟΣ", "هذا كلب", "قِطّة", "مرحبا، بالعالم؟", "שלום עולם", "हिन्दी में", "ภาษาไทย", "Tiếng Việt",
          "İstanbul ısı", "Straße GROẞ", "Ærø Ølstrup", "łódź", "þorn ðe", "ǅ ǆ ĳ", "ﬁrst ﬂoor eﬃcient", "ŉ", "Ꭰ Ꭱ", "ⅷ ⒜", "ª º"]  # fmt: skip
MARKS = ["cafe\u0301", "café", "n\u0303", "A\u030a", "a\u0323\u0307", "Z\u0351\u036b\u0343", "\u0301", "e\u0301\u0301", "ṩ", "s\u0307\u0323", "\u1e9b\u0323", "naïve DÉJÀ VU", "\u212b \u2126"]  # fmt: skip
HTML = ["&amp;", "Tom &amp; Jerry", "&lt;b&gt;", "&quot;hi&quot;", "it&#39;s", "it&#x27;s", "caf&eacute;", "&EACUTE;COLE", "a&nbsp;b", "&copy 2026", "&amp;amp;", "&amp;lt;", "AT&T; x",
        "&bogus;", "fish &chips", "&#8217;", "&#146;", "1 &lt; 2 < 3 &amp; 4", "&notit;", "&#0;", "&euro;5", "R&amp;D &mdash; x"]  # fmt: skip
QUOTES = ["“double”", "‘single’", "don’t", "the cat’s", "„unten“", "‚so‘", "«guillemets»", "rock ’n’ roll", "5′ 6″", "ʼn", "‛odd‟", "—em—dash—", "en–dash", "ellipsis…", "• bullet", "x × y ÷ z"]  # fmt: skip
CONTROL = ["tab\there", "line\nbreak", "two\r\nlines", "a\n\n\nb", "  leading", "trailing  ", "a   b", "nul\x00byte", "bell\x07", "\x1b[31mred\x1b[0m", "del\x7f", "\ufeffbom", "zero\u200bwidth",
           "soft\u00adhyphen", "a\u00a0b", "a\u2003b", "a\u2028b", "a\u0085b", "\u202eltr", "a\x0bb\x0cc", "\u200e\u200f", "x\u2060y", "\ufffd", "\ue000", "\x92 \x80"]  # fmt: skip
MOJIBAKE = ["schÃ¶n", "donâ€™t", "cafÃ© crÃ¨me", "â€œquotedâ€\x9d", "ä½ å¥½", "Ð¿Ñ€Ð¸Ð²ÐµÑ‚", "naÃ¯ve rÃ©sumÃ©", "ðŸ˜€"]
LONG = ["word " * 120, "x" * 300, "猫" * 150, "🐱" * 60, "a photo of a cat, " * 30, "1234567890" * 20, "Ab" * 99, "é" * 101, "it's " * 80, ". " * 90]  # fmt: skip
FAMILIES = (WORDS, NUMBERS, URLS, EMOJI, CJK, OTHERS, MARKS, HTML, QUOTES, CONTROL)


def _mixed(count: int) -> list[str]:
    """``count`` texts of two to five strings each, with or without a space between them."""
    draw = random.Random(20261125)
    return [
        draw.choice(("", " ", " ", ", ")).join(draw.choice(draw.choice(FAMILIES)) for _ in range(draw.randint(2, 5)))
        for _ in range(count)
    ]


_PLAIN = [text for family in FAMILIES for text in family] + LONG + MOJIBAKE
STRINGS = _PLAIN + _mixed(500 - len(_PLAIN))
