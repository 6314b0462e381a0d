"""Types that several settings are made of."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, Field

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]

Text = Annotated[str, BeforeValidator(lambda given: str(given) if type(given) in {int, float} else given)]
"""A string that YAML may take for a number: ``cpu: 16``."""


AeTitle = Annotated[str, Field(pattern=r"^[!-\[\]-~][ -\[\]-~]{0,15}$")]
"""Name of a DICOM application: up to 16 characters of ASCII without backslash (PS3.5 section 6.2)."""

SECRET_NAME = re.compile(r"PASS(WORD|WD|PHRASE)?(_|$)|SECRET|TOKENS?(_|$)|CREDENTIAL|PRIVATE|API_?KEY|(^|_)KEY$", re.IGNORECASE)
SECRET_VALUE = re.compile(r"://[^/@\s]*:[^/@\s]*@")
"""An address with a password in it."""
