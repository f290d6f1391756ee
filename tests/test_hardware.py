"""What there is: read from files of the kernel's kind, and measured alike on all ranks."""

import math
from collections import Counter
from dataclasses import astuple, replace
from pathlib import Path

import psutil
import pytest
import torch

from engine.bands import Mesh
from engine.hardware import Speeds, cgroup_room, free_disk_bytes, free_memory_bytes, measure
from engine.simulation import Cost
from tests.ranks import run_ranks

ALONE = Mesh(0, 1, torch.device("cpu"), None)


def write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_the_room_under_limits_of_cgroups_version_2(tmp_path):
    write(tmp_path / "own", "0::/job/step\n")
    write(tmp_path / "job/memory.max", "1000\n")
    write(tmp_path / "job/memory.current", "700\n")
    write(tmp_path / "job/memory.stat", "anon 500\ninactive_file 150\n")
    write(tmp_path / "job/step/memory.max", "max\n")
    write(tmp_path / "job/step/memory.current", "600\n")
    assert cgroup_room(tmp_path, tmp_path / "own") == [450]  # cached files can go


def test_the_room_under_limits_of_cgroups_version_1(tmp_path):
    write(tmp_path / "own", "9:cpu:/elsewhere\n4:memory:/box\n")
    write(tmp_path / "memory/box/memory.limit_in_bytes", "900\n")
    write(tmp_path / "memory/box/memory.usage_in_bytes", "400\n")
    write(tmp_path / "memory/memory.limit_in_bytes", "5000\n")
    write(tmp_path / "memory/memory.usage_in_bytes", "6000\n")
    assert cgroup_room(tmp_path, tmp_path / "own") == [500, 0]


def test_no_cgroups_no_limits(tmp_path):
    assert cgroup_room(tmp_path, tmp_path / "own") == []


def test_disk_space_where_the_folder_is_yet_to_be_made(tmp_path):
    path = tmp_path / "not" / "there" / "picture.png"
    assert math.isclose(free_disk_bytes(path), psutil.disk_usage(str(tmp_path)).free, rel_tol=0.2)


def memory_and_speeds(mesh):
    return free_memory_bytes(mesh), measure(mesh, torch.float32, 16)


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(2, memory_and_speeds)


def test_ranks_of_one_host_share_its_memory(two_ranks):
    (free, _), (other, _) = two_ranks
    assert free == other
    assert free <= 0.6 * psutil.virtual_memory().total


def test_all_ranks_know_the_same_speeds(two_ranks):
    (_, speeds), (_, others) = two_ranks
    assert speeds == others
    assert all(0 < speed < math.inf for speed in astuple(speeds))


def test_a_single_rank_waits_for_no_messages():
    speeds = measure(ALONE, torch.float32, 16)
    silent = Cost(flops=Counter(product=10**9), rounds=0)
    assert speeds.seconds(replace(silent, rounds=100)) == speeds.seconds(silent) > 0


def test_times_add_up():
    speeds = Speeds(10, 20, 30, 1, 40, 50, 60)
    cost = Cost(
        flops=Counter(product=10, convolution=40),
        bytes_moved=90,
        operations=160,
        rounds=250,
        bytes_sent=360,
    )
    assert speeds.seconds(cost) == 1 + 2 + 3 + 4 + 5 + 6


def test_the_slowest_of_each():
    mine, theirs = Speeds(1, 2, 3, 4, 5, 6, 7), Speeds(7, 6, 5, 4, 3, 2, 1)
    assert astuple(mine.slowest([theirs])) == (1, 2, 3, 4, 3, 2, 1)


def test_the_machine_is_read():
    assert Path("/proc").exists() is False or free_memory_bytes(ALONE) > 2**20
