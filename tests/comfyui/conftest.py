"""A real ComfyUI for the tests of the nodes, with daemons of 1, 2 and 3 ranks beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from comfyui_graphs import MODELS, Pair, TinyModel, save
from comfyui_server import NEWEST, PATH, PYTHON, ComfyUI, Outcome, version
from fidelity_table import Measured, write_version
from helpers import Daemon, relative_error
from image_cases import Case, write
from video_cases import VIDEO, graph_of, skip_what_comfyui_lacks

Both = Callable[..., Outcome]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where the table of results goes."""
    parser.addoption("--fidelity", metavar="FILE", help="write the nodes' fidelity into this document")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs ComfyUI."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.comfyui)
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(autouse=True, scope="session")
def _comfyui_at_hand() -> None:
    if not PATH:
        pytest.skip("set COMFYUI_PATH to a ComfyUI checkout, and COMFYUI_PYTHON to an interpreter that can run it")


@pytest.fixture(scope="session")
def comfyui_models(tmp_path_factory: pytest.TempPathFactory, _comfyui_at_hand: None) -> Path:
    """ComfyUI's models folder, which is a root of the daemons too."""
    folder = tmp_path_factory.mktemp("comfyui")
    (folder / "diffusion_models").mkdir()
    for model in MODELS.values():
        save(model, folder / "diffusion_models")
    return folder


@pytest.fixture(scope="session")
def endpoints(comfyui_models: Path) -> Iterator[Callable[[int], Daemon]]:
    """The daemon with so many ranks."""
    started: dict[int, Daemon] = {}
    with ExitStack() as stack:

        def get(ranks: int) -> Daemon:
            if ranks not in started:
                started[ranks] = stack.enter_context(Daemon(ranks, [comfyui_models]))
            return started[ranks]

        yield get


@pytest.fixture(scope="session")
def comfyui(endpoints: Callable[[int], Daemon], comfyui_models: Path) -> Iterator[ComfyUI]:
    """ComfyUI, by default with the daemon of three ranks."""
    with ComfyUI(PATH, PYTHON, endpoints(3).endpoint, comfyui_models) as comfyui:
        yield comfyui


@pytest.fixture(scope="session")
def pair(endpoints: Callable[[int], Daemon]) -> Callable[[TinyModel], Pair]:
    """A graph with branches through daemons of 1, 2 and 3 ranks."""
    return lambda model: Pair(model, {f"taco{ranks}": (ranks, endpoints(ranks).endpoint) for ranks in (1, 2)})


@pytest.fixture
def case(request: pytest.FixtureRequest, comfyui: ComfyUI, comfyui_models: Path) -> Case:
    """A video family's model, by its golden's name. Its file lies where ComfyUI looks for it, with a LoRA."""
    case = VIDEO[request.param]
    skip_what_comfyui_lacks(case, comfyui)
    write(case, comfyui_models)
    return case


@pytest.fixture
def run(case: Case, endpoints: Callable[[int], Daemon]) -> Pair:
    """A graph with this model, and branches through daemons of 1, 2 and 3 ranks."""
    return graph_of(case, {f"taco{ranks}": (ranks, endpoints(ranks).endpoint) for ranks in (1, 2)})


MEASURED = pytest.StashKey[list[Measured]]()


@pytest.fixture
def both(comfyui: ComfyUI, request: pytest.FixtureRequest) -> Callable[..., Outcome]:
    """Run all branches of a graph; the latents that samplers with these names saved agree with stock's."""
    measured = request.config.stash.setdefault(MEASURED, [])
    test = request.node.originalname or request.node.name
    case = request.node.callspec.id if hasattr(request.node, "callspec") else ""

    def run(pair: Pair, *saves: str, most: float = 1e-5, server: ComfyUI = comfyui) -> Outcome:
        lacking = {node["class_type"] for node in pair.nodes.values()} - server.nodes.keys()
        lacking = {name for name in lacking if not name.startswith(("TACODiT", "Test"))}
        if lacking and version() < NEWEST:
            pytest.skip(f"this version of ComfyUI has no {', '.join(sorted(lacking))}")
        outcome = server.run(pair.nodes)
        assert outcome.kind == "success", outcome.error
        errors = {}
        for name in pair.saved(*(saves or ("",))):
            stock = server.latent(pair.file("stock", name))
            assert stock.isfinite().all()
            assert stock.std() > 0
            for branch, ranks in pair.ranks.items():
                error = relative_error(server.latent(pair.file(branch, name)), stock)
                errors[f"{name} at {ranks} ranks"] = error
                measured.append(Measured(test, case, name.lstrip("_"), ranks, error))
        assert {name: error for name, error in errors.items() if not error <= most} == {}
        return outcome

    return run


@pytest.fixture(autouse=True, scope="session")
def _fidelity_table(request: pytest.FixtureRequest, comfyui: ComfyUI) -> Iterator[None]:
    """With ``--fidelity FILE``, what was measured goes into that document once all tests are through."""
    yield
    path = request.config.getoption("--fidelity", default=None)
    measured = request.config.stash.get(MEASURED, [])
    if path is not None and measured:
        system = comfyui.get("/system_stats")["system"]
        write_version(Path(path), system, measured, request.session.testsfailed)
