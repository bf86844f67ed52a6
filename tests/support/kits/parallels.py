"""The conformance kit of Parallels."""

from __future__ import annotations

from vmconv.testing import FormatTests
from vmconv_parallels import Parallels

OPTIONS: tuple[dict[str, str], ...] = ({}, {"cluster_size": "4K"}, {"cluster_size": "64K"}, {"cluster_size": "8M"})


class ParallelsKit(FormatTests):
    format = Parallels()
    variants = (*OPTIONS, {"cluster_size": "512"})
    wrong_options = (
        {"cluster_size": "256"},
        {"cluster_size": "63K"},
        {"cluster_size": "2G"},
        {"cluster_size": "big"},
    )
