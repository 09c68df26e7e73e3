import json

import pytest
import torch
from safetensors.torch import load_file

from ckptcache.cache import TrainingCache
from cli.conftest import WIDE, ckptcache_cli


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_export_writes_the_model(cli_json, cli, cache, tmp_path, ending):
    file = tmp_path / f"best.{ending}"
    done = cli_json("export", "release-1", file)
    assert done == {"checkpoint": cache.best, "path": str(file), "bytes": file.stat().st_size}
    tensors = load_file(file) if ending == "safetensors" else torch.load(file, weights_only=True)
    assert torch.equal(tensors["weight"], TrainingCache(cache.folder).load(cache.best)["model"]["weight"])
    refused = cli("export", "release-1", file, rc=1)
    assert "it" in refused.stderr
    assert "there already" in refused.stderr
    assert cli("export", "release-1", file, "--overwrite").stdout.startswith(f"wrote {file} (")


def test_export_refuses_what_it_cannot_write(cli, tmp_path):
    assert "must end in .pt or .safetensors" in cli("export", "best", tmp_path / "x.bin", rc=1).stderr
    assert "no such file" in cli("export", "best", tmp_path / "none" / "x.pt", rc=1).stderr
    assert list(tmp_path.glob("x*")) == []


def test_exporting_a_damaged_one_is_4_and_writes_nothing(cli, cache, tmp_path):
    path = cache.folder / "checkpoints" / f"{cache.best}.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert "is damaged" in cli("export", cache.best, tmp_path / "x.pt", rc=4).stderr
    assert not (tmp_path / "x.pt").exists()


def test_import_takes_up_a_foreign_file(cli_json, cache, tmp_path):
    torch.save({"weight": torch.ones(2, 8)}, tmp_path / "foreign.pt")
    (tmp_path / "gpt.json").write_text(json.dumps(WIDE))
    described = ("--iteration", "5000", "--val-loss", "0.5", "--tag", "a", "--model-config", tmp_path / "gpt.json")
    record = cli_json("import", tmp_path / "foreign.pt", *described)["checkpoint"]
    assert (record["iteration"], record["val_loss"], record["tags"]) == (5000, 0.5, ["imported", "a"])
    assert torch.equal(TrainingCache(cache.folder).load(record["id"])["model"]["weight"], torch.ones(2, 8))


def test_import_evicts_nothing_and_says_so(cli, cli_json, tmp_path, monkeypatch):
    monkeypatch.setenv("CKPTCACHE_MAX_CHECKPOINTS", "2")
    torch.save({"weight": torch.ones(2, 8)}, tmp_path / "foreign.pt")
    assert "5 checkpoints exceed max_checkpoints 2" in cli("import", tmp_path / "foreign.pt").stderr
    assert len(cli_json("ls")["checkpoints"]) == 5


def test_import_makes_a_cache_of_the_folder_that_is_named(tmp_path):
    torch.save({"weight": torch.ones(2, 8)}, tmp_path / "foreign.pt")
    ckptcache_cli("import", tmp_path / "foreign.pt", "--cache-dir", tmp_path / "new")
    assert len(json.loads(ckptcache_cli("ls", "--json", "--cache-dir", tmp_path / "new").stdout)["checkpoints"]) == 1


class Payload:
    def __reduce__(self):
        return print, ("ran",)


def test_import_refuses_what_is_no_checkpoint(cli, tmp_path, capfd):
    torch.save({"model": Payload()}, tmp_path / "code.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    assert "could run code" in cli("import", tmp_path / "code.pt", rc=1).stderr
    assert "is not a checkpoint" in cli("import", tmp_path / "text.pt", rc=1).stderr
    assert "is empty" in cli("import", tmp_path / "empty.pt", rc=4).stderr
    assert "does not exist" in cli("import", tmp_path / "none.pt", rc=2).stderr
    assert "is a directory" in cli("import", tmp_path, rc=2).stderr
    assert "ran" not in capfd.readouterr().out
