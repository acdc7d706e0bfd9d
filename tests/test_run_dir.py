"""What a directory must hold to be trained in."""

import pytest

from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.configs import preset
from sparsezoo_jax.errors import UserError
from sparsezoo_jax.run_dir import open_for_training, write_config


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return preset("spark", "tiny")


@pytest.mark.parametrize("left", [(), (".config.json.partial",), (".lease", ".lease.x7", ".config.json.partial")])
def test_what_a_run_killed_in_its_first_moments_leaves_is_no_run_and_no_obstacle(tmp_path, config, left):
    for name in left:
        (tmp_path / name).write_text('{"arch": "sp')
    assert not open_for_training(tmp_path, config, fresh=True)
    write_config(tmp_path, config)
    assert open_for_training(tmp_path, config, fresh=False)
    with pytest.raises(UserError, match="is not empty"):
        open_for_training(tmp_path, config, fresh=True)


def test_other_files_are_not_touched(tmp_path, config):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"holds files but no run \(thesis\.tex\)"):
        open_for_training(tmp_path, config, fresh=False)
