import pytest

from speed_utils import settings
from speed_utils.settings import (
    SettingsError,
    coerce,
    find_stage,
    load_profile,
    notebook_parameters,
    stage_names,
)


@pytest.mark.parametrize("name", ["smoke", "laptop", "gpu", "paper"])
def test_every_profile_is_complete_and_valid(name):
    profile = load_profile(name)
    assert list(profile.stages) == stage_names()
    for stage, values in profile.stages.items():
        assert set(values) == set(notebook_parameters(stage)) - {"run"}


def test_common_yaml_names_every_parameter_and_equals_the_notebooks_defaults():
    common = settings._read_yaml(settings.PROFILES_DIR / "common.yaml")
    for stage in stage_names():
        for name, parameter in notebook_parameters(stage).items():
            if name == "run":
                continue
            given = {**common["shared"], **common.get(stage, {})}
            assert name in given, f"{stage}.{name} is not in common.yaml"
            value = coerce(given[name], parameter.type, name)
            assert value == parameter.default, f"{stage}.{name}"


def test_the_papers_values_are_the_papers():
    stages = load_profile("paper").stages
    assert stages["04_train_junior"]["learning_rate"] == 1e-4
    assert stages["06_train_senior"]["learning_rate"] == 1e-5
    assert stages["06_train_senior"]["beta"] == 0.1
    assert stages["08_train_revisor"]["learning_rate"] == 5e-6
    assert stages["08_train_revisor"]["batch_size"] == 24
    assert stages["09_synthesize"]["temperature"] == stages["09_synthesize"]["top_p"] == 1.0
    assert stages["11_train_embedder"]["batch_size"] == 1536
    assert stages["03_write_seed_data"]["n_examples"] == 25_000


def test_every_value_of_the_paper_profile_carries_its_source():
    text = (settings.PROFILES_DIR / "paper.yaml").read_text()
    for line in text.splitlines():
        if line.startswith("  ") and ":" in line:
            comment = line.partition("  # ")[2]
            assert any(
                word in comment
                for word in ("Section", "Appendix", "Table", "Fig.", "ours", "E5_mistral")
            ), line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("04_train_junior.epoch=2", "did you mean 'epochs'"),
        ("04_train_juniorr.epochs=2", "did you mean '04_train_junior'"),
        ("04_train_junior.epochs=many", "'many' is not float"),
        ("04_train_junior.batch_size=2.5", "2.5 is not int"),
        ("11_train_embedder.in_batch_negatives=3", "3 is not str"),
        ("epochs=2", r"write stage\.key=value"),
        ("04_train_junior.run=x", "no parameter 'run'"),
        ("shared.sead=1", "did you mean 'seed'"),
    ],
)
def test_wrong_overrides_are_refused_with_the_nearest_name(override, message):
    with pytest.raises(SettingsError, match=message):
        load_profile("laptop", [override])


def test_overrides_take_short_stage_names_and_numeric_text():
    stages = load_profile("laptop", ["4.learning_rate=1e-5", "synthesize.n_examples=7"]).stages
    assert stages["04_train_junior"]["learning_rate"] == 1e-5
    assert stages["09_synthesize"]["n_examples"] == 7
    assert find_stage("15") == "15_cost"


def test_a_profile_of_ones_own_and_its_faults(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("about: mine\nshared: {seed: 7}\n09_synthesize: {n_examples: 5}\n")
    profile = load_profile(path)
    assert profile.name == "mine" and profile.stages["03_write_seed_data"]["seed"] == 7
    path.write_text("9_synthesize: {n_examples: 5}\n")
    with pytest.raises(SettingsError, match="did you mean '09_synthesize'"):
        load_profile(path)
    path.write_text("a: [1\n")
    with pytest.raises(SettingsError, match="not valid YAML"):
        load_profile(path)
    with pytest.raises(SettingsError, match="did you mean 'laptop'"):
        load_profile("lap_top")
