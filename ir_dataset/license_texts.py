"""Licences known by their words, for copyright files that give a text under a name of their own.

The whole text has to be the licence's, but for the names that it leaves to be filled in and a few words
before it, such as a title and copyright lines. A clause more or less is another licence.

Source: https://opensource.org/licenses
"""

from __future__ import annotations

import hashlib
import re

__all__ = ["recognise"]

_NAMES = r"(?:\w+ ){1,25}?"
_NUMBER = r"(?:[1-4a-d] )?"
_MAX_WORDS_BEFORE = 40

_BSD_START = (
    "redistribution and use in source and binary forms with or without modification are permitted"
    f" provided that the following conditions are met {_NUMBER}redistributions of source code must"
    " retain the above copyright notice this list of conditions and the following disclaimer"
    f" {_NUMBER}redistributions in binary form must reproduce the above copyright notice this list of"
    " conditions and the following disclaimer in the documentation and or other materials provided with"
    " the distribution "
)
_BSD_THIRD = (
    f"{_NUMBER}(?:neither the names? of {_NAMES}nor the names of (?:its|their|any) (?:\\w+ )?contributors"
    f" may be used|the names? of {_NAMES}may not be used) to endorse or promote products derived from this"
    " software without (?:specific )?prior written permission "
)
_BSD_END = (
    f"this software is provided by {_NAMES}as is and any express or implied warranties including but not"
    " limited to the implied warranties of merchantability and fitness for a particular purpose are"
    f" disclaimed in no event shall {_NAMES}be liable for any direct indirect incidental special exemplary"
    " or consequential damages including but not limited to procurement of substitute goods or services"
    " loss of use data or profits or business interruption however caused and on any theory of liability"
    " whether in contract strict liability or tort including negligence or otherwise arising in any way"
    " out of the use of this software even if advised of the possibility of such damages?"
)

_MIT = (
    "permission is hereby granted free of charge to any person obtaining a copy of this software and"
    " associated documentation files the software to deal in the software without restriction"
    " including without limitation the rights to use copy modify merge publish distribute sublicense"
    " and or sell copies of the software and to permit persons to whom the software is furnished to"
    " do so subject to the following conditions the above copyright notice and this permission notice"
    " shall be included in all copies or substantial portions of the software the software is"
    " provided as is without warranty of any kind express or implied including but not limited to"
    " the warranties of merchantability fitness for a particular purpose and noninfringement in no"
    f" event shall {_NAMES}be liable for any claim damages or other liability whether in an action of"
    " contract tort or otherwise arising from out of or in connection with the software or the use or"
    " other dealings in the software"
)

_TEXTS: dict[str, str] = {
    "MIT": _MIT,
    "X11": (
        f"{_MIT} except as contained in this notice the names? of {_NAMES}shall not be used in advertising"
        " or otherwise to promote the sale use or other dealings in this software without prior written"
        r" authorization from (?:\w+ ?){1,12}"
    ),
    "BSD-2-Clause": _BSD_START + _BSD_END,
    "BSD-3-Clause": _BSD_START + _BSD_THIRD + _BSD_END,
    "ISC": (
        "permission to use copy modify and (?:or )?distribute this software for any purpose with or without"
        " fee is hereby granted provided that the above copyright notice and this permission notice"
        f" appear in all copies the software is provided as is and {_NAMES}disclaims? all warranties with"
        " regard to this software including all implied warranties of merchantability and fitness in no"
        f" event shall {_NAMES}be liable for any special direct indirect or consequential damages or any"
        " damages whatsoever resulting from loss of use data or profits whether in an action of contract"
        " negligence or other tortious action arising out of or in connection with the use or performance"
        " of this software"
    ),
    "Zlib": (
        "this software is provided as is without any express or implied warranty in no event will the"
        " authors? be held liable for any damages arising from the use of this software permission is"
        " granted to anyone to use this software for any purpose including commercial applications and to"
        " alter it and redistribute it freely subject to the following restrictions"
        f" {_NUMBER}the origin of this software must not be misrepresented you must not claim that you"
        " wrote the original software if you use this software in a product an acknowledge?ment in the"
        f" product documentation would be appreciated but is not required {_NUMBER}altered source versions"
        " must be plainly marked as such and must not be misrepresented as being the original software"
        f" {_NUMBER}this notice may not be removed or altered from any source distribution"
    ),
}
_APACHE_TERMS = "30e4fead14bea27559ab87df4b7e795f30238bd249aae20bc792ba6615939d57"
"""sha256 of the words of the Apache licence's terms, which are too many to stand here."""
_APACHE = re.compile(
    r"(?:\w+ ){0,40}?apache license version 2 0 january 2004 (?:https? www apache org licenses )?"
    r"(?P<terms>terms and conditions for use .*?) end of terms and conditions"
    r"(?: appendix how to apply the apache license to your work .* and limitations under the license)?"
)

_PATTERNS = {name: re.compile(text) for name, text in _TEXTS.items()}


def recognise(text: str) -> str:
    """The SPDX name of the licence that the text is, or an empty string."""
    joined = re.sub(r"(?<=[A-Za-z])-\s*\n\s*(?=[a-zA-Z])", "", text)  # words parted at a line's end
    words = re.sub(r"[^a-z0-9]+", " ", joined.lower()).strip()
    apache = _APACHE.fullmatch(words)
    if apache:
        return "Apache-2.0" if _sha256(f"{apache['terms']} ") == _APACHE_TERMS else ""
    for name, pattern in _PATTERNS.items():
        found = pattern.search(words)
        if found and found.end() == len(words):
            before = words[: found.start()].count(" ")
            return name if before <= _MAX_WORDS_BEFORE else ""
    return ""


def _sha256(words: str) -> str:
    return hashlib.sha256(words.encode()).hexdigest()
