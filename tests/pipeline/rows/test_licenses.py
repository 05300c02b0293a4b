"""Licenses are found under any name and mapped to SPDX. Unknown licenses are not guessed."""

import pytest

from pipeline.rows.licenses import Licenses, attribution_of, license_of

CC = "creativecommons.org"


@pytest.mark.parametrize(("text", "spdx"), [
    # URLs, with versions, ports, deeds and anything around.
    (f"http://{CC}/licenses/by/4.0/", "CC-BY-4.0"), (f"https://{CC}/licenses/by-nc-sa/2.0", "CC-BY-NC-SA-2.0"),
    (f"https://{CC}/licenses/by-nd-nc/1.0/", "CC-BY-NC-ND-1.0"), (f"//{CC}/licenses/by-sa/3.0/de/", "CC-BY-SA-3.0-DE"),
    (f"https://{CC}/licenses/by-nc-sa/3.0/igo/", "CC-BY-NC-SA-3.0-IGO"),
    (f"https://{CC}/licenses/by/2.0/jp/", "CC-BY-2.0"), (f"https://{CC}/licenses/by/4.0/deed.de", "CC-BY-4.0"),
    (f"https://{CC}/licenses/by/2.0/legalcode", "CC-BY-2.0"), (f"HTTPS://{CC.upper()}/LICENSES/BY/2.5/", "CC-BY-2.5"),
    (f'<a href="https://{CC}/licenses/by-nc/4.0/">some rights reserved</a>', "CC-BY-NC-4.0"),
    (f"https://{CC}/publicdomain/zero/1.0/", "CC0-1.0"), (f"https://{CC}/publicdomain/mark/1.0/deed.en", "CC-PDM-1.0"),
    (f"http://{CC}/licenses/publicdomain/", "CC-PDDC"), (f"https://www.{CC}/licenses/by/4.0", "CC-BY-4.0"),
    # Names.
    ("CC BY 4.0", "CC-BY-4.0"), ("cc-by-nc-4.0", "CC-BY-NC-4.0"), ("CC BY-SA 3.0", "CC-BY-SA-3.0"), ("CC0", "CC0-1.0"),
    ("cc_by_nc_sa_2.0", "CC-BY-NC-SA-2.0"), ("CC-BY 4", "CC-BY-4.0"), ("CC BY-SA 3.0 DE", "CC-BY-SA-3.0-DE"),
    ("CC BY-SA, version 3.0", "CC-BY-SA-3.0"), ("CC BY v4.0", "CC-BY-4.0"), ("© Jane Doe, CC BY 4.0.", "CC-BY-4.0"),
    ("CC0 1.0 Universal", "CC0-1.0"), ("CC Zero", "CC0-1.0"), ("CC0 1.0 Universal (CC0 1.0) Public Domain Dedication",
                                                               "CC0-1.0"),
    ("Public Domain Mark 1.0", "CC-PDM-1.0"), ("Public Domain", "CC-PDM-1.0"), (" public  domain ", "CC-PDM-1.0"),
    ("Creative Commons Attribution 4.0 International", "CC-BY-4.0"),
    ("Creative Commons Attribution-NonCommercial-ShareAlike 3.0 Unported", "CC-BY-NC-SA-3.0"),
    ("Creative Commons Attribution-Share Alike 2.5", "CC-BY-SA-2.5"),
    ("Attribution-NoDerivs 2.0 Generic", "CC-BY-ND-2.0"),
    ("Creative Commons Attribution License (CC BY 4.0)", "CC-BY-4.0"),
    ("Attribution Non-Commercial No Derivatives 4.0", "CC-BY-NC-ND-4.0"),
    ("mit", "MIT"), ("Apache License 2.0", "Apache-2.0"), ("apache-2.0", "Apache-2.0"), ("OFL-1.1", "OFL-1.1"),
    ("CC-BY-SA-4.0 OR MIT", "CC-BY-SA-4.0 OR MIT"),
    # Flickr's and COCO's numbers.
    (1, "CC-BY-NC-SA-2.0"), (2, "CC-BY-NC-2.0"), (3, "CC-BY-NC-ND-2.0"), ("4", "CC-BY-2.0"), (5, "CC-BY-SA-2.0"),
    (6, "CC-BY-ND-2.0"), (9, "CC0-1.0"), (10, "CC-PDM-1.0"), (11, "CC-BY-4.0"), (16, "CC-BY-NC-ND-4.0"),
    ([f"https://{CC}/licenses/by/4.0/", "other"], "CC-BY-4.0"), (b"cc-by-4.0", "CC-BY-4.0"), (4.0, "CC-BY-2.0"),
    ('["CC BY 4.0", "https://creativecommons.org/licenses/by/4.0/"]', "CC-BY-4.0"),
    ('{"name": "CC BY 4.0", "note": "see the page"}', "CC-BY-4.0"),
    # Whole forms.
    (f"https://{CC}/licenses/by/2.0/?ref=search&atype=rich", "CC-BY-2.0"), ("CC0 Public Domain", "CC0-1.0"),
    (f"Licensed under the CC BY 4.0 license: https://{CC}/licenses/by/4.0/", "CC-BY-4.0"),
    (f"This work is licensed under a <a rel='license' href='http://{CC}/licenses/by-nc/4.0/'>Creative Commons "
     "Attribution-NonCommercial 4.0 International License</a>.", "CC-BY-NC-4.0"),
    ("This image is available under CC0", "CC0-1.0"), ("image: public domain", "CC-PDM-1.0"),
    ("Creative Commons Attribution 4.0 International Public License", "CC-BY-4.0"),
    # Texts that permit less than a part of them says, or name several licenses.
    ("CC BY-NC-ND 4.0 (text is CC0)", ""), ("Not CC0; all rights reserved", ""), ("CC BY 3.0 (non-commercial)", ""),
    ("CC-BY-4.0-NC", ""), ("CC BY 4.0 NC", ""), ("CC BY 4.0 NonCommercial", ""), ("CC BY 4.0, CC BY-NC 4.0", ""),
    ("CC BY 4.0 NO DERIVATIVES", ""), ("CC BY 4.0 / no derivatives", ""), ("CC0 (metadata)", ""), ("non-CC0", ""),
    ("CC BY 4.0 until 2020", ""), ("formerly CC BY 4.0", ""), ("CC BY 4.0 or CC BY 3.0", ""), ("CC0, CC BY 4.0", ""),
    ("CC BY 4.0. All rights reserved", ""), ("public domain in the US", ""), ("public domain, CC BY 4.0", ""),
    ("CC BY 4.0 except logos", ""), ("pas CC0", ""), ("no CC0", ""), ("CC0?", ""), ("!CC0", ""), ("CC 0.5", ""),
    ("© Jane Doe, not CC BY 4.0", ""), ("© Jane Doe no reuse, CC0", ""), ("Open Government Licence", ""),
    ("© Jane Doe, all rights reserved, CC BY 4.0", ""), ("CC01", ""),
    (f"https://{CC}/licenses/by/4.0/ (text), https://{CC}/licenses/by-nc/4.0/ (images)", ""),
    (f"https://{CC}/licenses/by/4.0/ text only", ""), (f"https://{CC}/licenses/by/4.0/nonsense", ""),
    (["CC BY 4.0", "CC BY-NC 4.0"], ""), ('["CC BY 4.0", "all rights reserved"]', ""), (["CC0", "non-commercial"], ""),
    ({"images": "© X. Not for reuse", "text": "CC0"}, ""),
    # Unknown: never a guess.
    ("", ""), (None, ""), (0, ""), (7, ""), (8, ""), (99, ""), ("All rights reserved", ""), ("CC BY", ""), ("cc", ""),
    (f"https://{CC}/licenses/by/", ""), (f"https://{CC}/licenses/sampling+/1.0/", ""),
    (f"https://{CC}/licenses/nc/1.0/", ""), ("CC BY, 3 of 4", ""), ("CC BY 12.0", ""), ("CC BY 9.0", ""),
    ("photo by 3.0", ""), ("Creative Commons", ""), ("http://rightsstatements.org/vocab/InC/1.0/", ""),
    ("In Copyright", ""), ("No Copyright - United States", ""), ("Image and original data provided by X", ""),
    ("© 2004 Artists Rights Society", ""), ("not in the public domain", ""), ("Attribution", ""), (True, ""),
])
def test_licenses_are_recognized_in_any_spelling(text, spdx):
    assert license_of({"license": text}).spdx == spdx


@pytest.mark.parametrize(("columns", "spdx", "text"), [
    ({"License": f"https://{CC}/licenses/by/2.0/"}, "CC-BY-2.0", f"https://{CC}/licenses/by/2.0/"),
    ({"image_license": "CC0"}, "CC0-1.0", "CC0"), ({"Licenses": "MIT"}, "MIT", "MIT"),
    ({"Rights and Reproduction": "CC0"}, "CC0-1.0", "CC0"), ({"rights": "CC BY 4.0"}, "CC-BY-4.0", "CC BY 4.0"),
    ({"license_url": f"http://{CC}/publicdomain/zero/1.0/", "license": "see the page"}, "CC0-1.0",
     f"http://{CC}/publicdomain/zero/1.0/"),
    ({"media.usage.access": "CC0"}, "CC0-1.0", "CC0"), ({"licence_spdx": "MIT"}, "MIT", "MIT"),
    ({"Is Public Domain": "True", "Rights and Reproduction": "Gift of 1906"}, "CC-PDM-1.0", "Gift of 1906"),
    ({"Is Public Domain": "True", "Rights and Reproduction": "© The Met"}, "", "© The Met"),
    # One column permits less than another.
    ({"license": "All rights reserved", "rights": "CC0"}, "", "CC0; All rights reserved"),
    ({"license": "All rights reserved", "is_public_domain": True}, "", "All rights reserved"),
    ({"license": 0, "rights": "CC0"}, "", "CC0; 0"), ({"license": "CC0", "is_public_domain": False}, "", "CC0"),
    ({"license": "CC BY 4.0", "rights": "CC BY-NC 4.0"}, "", "CC BY 4.0; CC BY-NC 4.0"),
    ({"license": "CC BY 4.0", "License": "CC BY-NC 4.0"}, "", "CC BY 4.0; CC BY-NC 4.0"),
    ({"license": "CC0", "usage": "non-commercial use"}, "", "CC0; non-commercial use"),
    *(({"license": "CC0", "usage": use}, "", f"CC0; {use}") for use in (
        "Educational use only", "no commercial use", "for personal use", "editorial", "Contact us for a license")),
    ({"is_public_domain": True, "rights": "Educational use only"}, "",
     "Educational use only"), ({"license": "CC0", "usage": "No known restrictions"}, "CC0-1.0", "CC0"),
    ({"is_public_domain": 1.0}, "CC-PDM-1.0", "public domain"),
    ({"is_public_domain": 0.0, "license": "CC0"}, "", "CC0"),
    ({"license": "CC BY 4.0", "rights": "CC0"}, "CC-BY-4.0", "CC BY 4.0"),
    ({"license": "CC BY 4.0", "copyright": "© Jane Doe"}, "CC-BY-4.0", "CC BY 4.0"),
    ({"license": "CC BY-SA 3.0", "license_url": f"https://{CC}/licenses/by-sa/3.0/de/"}, "CC-BY-SA-3.0-DE",
     f"https://{CC}/licenses/by-sa/3.0/de/"),
    ({"license": "CC BY 4.0", "license_url": f"https://{CC}/licenses/by/4.0/"}, "CC-BY-4.0", "CC BY 4.0"),
    ({"license": "public domain", "rights": "CC0"}, "CC-PDM-1.0", "public domain"),
    ({"license": "CC BY 4.0", "is_public_domain": False}, "CC-BY-4.0", "CC BY 4.0"),
    ({"is_public_domain": True}, "CC-PDM-1.0", "public domain"), ({"is_public_domain": False}, "", ""),
    ({"license": 4}, "CC-BY-2.0", "4"), ({"rights": 4}, "", "4"), ({"license": None}, "", ""),
    ({"LICENSE": "all rights reserved"}, "", "all rights reserved"), ({"other": "CC0"}, "", ""), ({}, "", ""),
])
def test_columns_of_licenses_are_found(columns, spdx, text):
    assert license_of(columns) == (spdx, text)


def test_columns_of_authors_titles_and_pages_are_found():
    openimages = {"OriginalURL": "https://farm.example/1.jpg", "OriginalLandingURL": "https://www.example.org/1",
                  "AuthorProfileURL": "https://www.example.org/people/a", "Author": "Ann", "Title": "Boats"}
    assert attribution_of(openimages) == {"author": "Ann", "title": "Boats", "page": "https://www.example.org/1"}
    met = {"Artist Display Name": "Claude Monet", "Title": "Haystacks", "Link Resource": "http://met.example/1"}
    assert attribution_of(met) == {"author": "Claude Monet", "title": "Haystacks", "page": "http://met.example/1"}
    rijks = {"objectCreator[1]": "Rembrandt", "objectTitle[1]": "De Nachtwacht",
             "objectPersistentIdentifier": "http://hdl.example/1"}
    assert attribution_of(rijks) == {"author": "Rembrandt", "title": "De Nachtwacht", "page": "http://hdl.example/1"}
    pd12m = {"id": "1", "source": "Example Museum", "caption": "a boat"}
    assert attribution_of(pd12m) == {"author": "", "title": "", "page": ""}
    assert attribution_of({"title": "  ", "artist_title": ["Ann", "Bob"]}) == {
        "author": "Ann", "title": "", "page": ""}


def test_license_patterns_match():
    allowed = Licenses("CC0-1.0, CC-BY-*")
    assert all(map(allowed.allow, ("CC0-1.0", "CC-BY-2.0", "CC-BY-4.0", "CC-BY-3.0-DE")))
    assert not any(map(allowed.allow, ("CC-BY-NC-4.0", "CC-BY-SA-4.0", "MIT", "")))
    assert Licenses("cc-by*").allow("CC-BY-NC-4.0") and not Licenses("*").allow("")
    assert Licenses("CC-BY-NC-*").allow("CC-BY-NC-4.0") and not Licenses("CC-BY-NC-*").allow("CC-BY-NC-SA-4.0")
    assert allowed.allow("CC-BY-4.0 OR MIT") and allowed.allow("CC-BY-4.0 AND CC0-1.0")
    assert not any(map(allowed.allow, ("CC-BY-4.0 AND MIT", "CC0-1.0 AND (MIT OR CC-BY-4.0)", "MIT OR Apache-2.0")))
    assert not Licenses("CC0*").allow("CC0-1.0 AND CC-BY-NC-4.0")
    for wrong in ("CC-BY", "CC-*", "CC-BY-4", "free", "CC0-1.0,nothing", "MIT OR CC0-1.0"):
        with pytest.raises(ValueError, match="no SPDX identifier matches it"):
            Licenses(wrong)
