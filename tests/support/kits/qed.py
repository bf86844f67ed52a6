"""The conformance kit of QED."""

from __future__ import annotations

from vmconv.testing import FormatTests
from vmconv_qed import Qed

OPTIONS: tuple[dict[str, str], ...] = (
    {},
    {"cluster_size": "4K", "table_size": "2"},
    {"cluster_size": "1M", "table_size": "2"},
    {"table_size": "16"},
)


class QedKit(FormatTests):
    format = Qed()
    variants = OPTIONS
    wrong_options = (
        {"cluster_size": "2K"},
        {"cluster_size": "5K"},
        {"cluster_size": "128M"},
        {"table_size": "1"},
        {"table_size": "3"},
        {"table_size": "32"},
        {"table_size": "many"},
    )
