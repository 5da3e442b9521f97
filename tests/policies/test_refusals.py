"""Where a policy cannot be right it is refused by name."""

import pytest
from starkv_lab.demo.kept import kept_by_layer

from starkv_compile import OptionError, StarKVConfig
from starkv_compile.export.onnx.package import ExportOptions, export_model
from tests.policies.test_in_graphs import by_head


def test_policies_that_were_not_tried_are_not_exported(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    options = ExportOptions(
        checkpoint=tmp_path, out=tmp_path / "out", config=StarKVConfig(policy="tova")
    )
    with pytest.raises(
        OptionError, match="policy='tova' is not exported yet; use 'screen_novelty' or 'starkv'"
    ):
        export_model(None, options)


def test_cells_kept_are_not_told_by_layer_where_each_head_has_its_own():
    with pytest.raises(ValueError, match="each head keeps a set of its own"):
        kept_by_layer(by_head())
