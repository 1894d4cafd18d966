"""Configuration: where values come from, what is refused, and what the refusal says."""

import dataclasses

import pytest

from engine.config import (
    PRESETS,
    EngineConfig,
    RankEnv,
    dotted_keys,
    from_dict,
    load,
    parse_text,
    valid_degrees,
)
from engine.config.rules import validate
from engine.errors import ConfigError, GeometryError


def test_the_defaults_are_valid_and_survive_a_round_trip():
    config = EngineConfig()
    validate(config)
    assert from_dict(config.to_dict()) == config
    assert config.latent_hw == (8, 12)
    assert config.tokens_per_frame == 24


def test_the_stronger_origin_wins_and_is_named(tmp_path):
    user, project = tmp_path / "user.toml", tmp_path / "project.toml"
    user.write_text("[run]\nchunks = 2\n[sink]\nfps = 8\n[comm]\ndist_timeout_s = 5\n")
    project.write_text("[run]\nchunks = 3\n[sink]\nfps = 9\n")
    loaded = load(
        [("user", user), ("project", project)],
        {"TPCTL_RUN_CHUNKS": "5", "TPCTL_SCHEDULE_DENOISING_STEP_LIST": "900, 300", "UNRELATED": "x"},
        {"run.chunks": "7", "schedule.recompute": "no"},
    )
    assert loaded.config.run.chunks == 7
    assert loaded.config.sink.fps == 9
    assert loaded.config.schedule.denoising_step_list == (900, 300)
    assert loaded.config.schedule.recompute is False
    assert loaded.config.comm.dist_timeout_s == 5.0
    assert loaded.origins["run.chunks"] == "flag"
    assert loaded.origins["sink.fps"] == f"project: {project}"
    assert loaded.origins["comm.dist_timeout_s"] == f"user: {user}"
    assert loaded.origins["schedule.denoising_step_list"] == "environment: TPCTL_SCHEDULE_DENOISING_STEP_LIST"
    assert loaded.origins["model.preset"] == "default"
    assert set(loaded.origins) == set(dotted_keys())


@pytest.mark.parametrize(
    ("data", "nearest"),
    [({"run": {"chunk": 3}}, "run.chunks"), ({"modl": {}}, "model"), ({"run": {"zzzz": 1}}, None)],
)
def test_an_unknown_key_suggests_the_nearest(data, nearest):
    with pytest.raises(ConfigError) as caught:
        from_dict(data)
    assert caught.value.code == "TP-1008"
    assert caught.value.evidence["nearest"] == nearest
    assert (nearest or "unknown key") in caught.value.message


def test_an_unknown_flag_is_refused_too():
    with pytest.raises(ConfigError, match=r"did you mean 'plan\.tp'"):
        load(overrides={"plan.tpp": "2"})


@pytest.mark.parametrize(
    ("dotted", "value", "code"),
    [
        ("run__chunks", "3", "TP-1006"),
        ("run__chunks", True, "TP-1006"),
        ("run__chunks", -1, "TP-1010"),
        ("schedule__recompute", 1, "TP-1006"),
        ("schedule__denoising_step_list", [1000.0], "TP-1006"),
        ("schedule__denoising_step_list", [500, 1000], "TP-1010"),
        ("schedule__denoising_step_list", [500, 500], "TP-1010"),
        ("schedule__denoising_step_list", [1001], "TP-1010"),
        ("schedule__denoising_step_list", [], "TP-1010"),
        ("schedule__kv_cache_attention_bias", 0.0, "TP-1010"),
        ("schedule__shift", 0.0, "TP-1010"),
        ("liveness__watchdog_s", 5.9, "TP-1011"),
        ("liveness__phase_budget_s", 0.0, "TP-1011"),
        ("comm__max_tensors", 0, "TP-1011"),
        ("tripwires__input_digest_every", -1, "TP-1011"),
        ("sink__fps", 0, "TP-1010"),
        ("sink__kinds", ["gif"], "TP-1007"),
        ("model__preset", "tinny", "TP-1007"),
        ("model__dtype", "bool", "TP-1007"),
        ("plan__tp_plan", "v2", "TP-1007"),
        ("geometry__height", 65, "TP-1101"),
        ("geometry__width", 8, "TP-1101"),
        ("geometry__window_frames", 5, "TP-1102"),
        ("geometry__sink_frames", -1, "TP-1101"),
        ("geometry__frames_per_chunk", 0, "TP-1101"),
        ("plan__tp", 3, "TP-1103"),
        ("plan__tp", 0, "TP-1103"),
    ],
)
def test_bad_values_have_stable_codes(dotted, value, code):
    with pytest.raises(ConfigError) as caught:
        EngineConfig().replace(**{dotted: value})
    assert caught.value.code == code
    assert caught.value.exit_code == 77
    assert caught.value.next_step


def test_geometry_names_the_nearest_height_and_the_command():
    with pytest.raises(GeometryError, match="multiple of 16, is 65; the nearest is 64") as caught:
        EngineConfig().replace(geometry__height=65)
    assert caught.value.next_step == "tpctl config check --set geometry.height=64"


def test_tp_that_does_not_divide_lists_the_valid_degrees():
    with pytest.raises(GeometryError, match="Valid degrees: 1, 2, 4") as caught:
        EngineConfig().replace(plan__tp=3)
    assert caught.value.evidence["valid"] == [1, 2, 4]
    assert valid_degrees(PRESETS["wan2.1-1.3b"]) == [1, 2, 4]
    assert valid_degrees(PRESETS["wan2.1-14b"]) == [1, 2, 4, 8]


def test_plan_aliases_are_canonical_before_parity():
    assert EngineConfig().replace(plan__tp_plan="v1.1c").parity_key() == EngineConfig().parity_key()
    assert EngineConfig().replace(run__chunks=5).parity_key() != EngineConfig().parity_key()


def test_every_key_changes_the_parity_key():
    base, seen = EngineConfig(), set()
    for dotted in dotted_keys():
        section, key = dotted.split(".")
        part = getattr(base, section)
        value = getattr(part, key)
        other = not value if isinstance(value, bool) else f"{value}x" if isinstance(value, str) else (
            (*value, value[0]) if isinstance(value, tuple) else value + 1
        )  # fmt: skip
        changed = dataclasses.replace(base, **{section: dataclasses.replace(part, **{key: other})})
        seen.add(changed.parity_key())
    assert len(seen) == len(dotted_keys())
    assert base.parity_key() not in seen


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [("YES", bool, True), ("0", bool, False), ("7", int, 7), ("2.5", float, 2.5), ("a,b", tuple[str, ...], ("a", "b"))],
)
def test_text_by_type(text, kind, value):
    assert parse_text(text, kind, "x.y", "flag") == value


def test_text_that_is_no_number_names_its_variable():
    with pytest.raises(ConfigError, match=r"TPCTL_RUN_CHUNKS: run\.chunks must be a whole number, is 'many'"):
        load(environ={"TPCTL_RUN_CHUNKS": "many"})


@pytest.mark.parametrize(("text", "code"), [("[run", "TP-1005"), ("run = 3", "TP-1003"), (None, "TP-1004")])
def test_bad_files_name_their_path(tmp_path, text, code):
    path = tmp_path / "c.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load([("project", path)])
    assert caught.value.code == code
    assert caught.value.where == str(path)


def test_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().run.chunks = 9


def test_the_launcher_s_environment():
    environ = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}
    assert RankEnv.from_environ(environ) == RankEnv(1, 2, 1, "h", 29500, 0)
    with pytest.raises(ConfigError, match="WORLD_SIZE is not set"):
        RankEnv.from_environ({"RANK": "0"})
    with pytest.raises(ConfigError, match="malformed"):
        RankEnv.from_environ({**environ, "MASTER_PORT": "http"})
