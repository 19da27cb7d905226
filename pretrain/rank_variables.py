"""The environment variables by which a launcher tells a process its rank: read before torch is imported."""

from collections.abc import Iterator, Mapping

from pretrain.errors import UserError

NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
# A variable with the value that a process alone has -> the variable that any other value needs.
PARTNERS = {("RANK", "0"): "WORLD_SIZE", ("LOCAL_RANK", "0"): "WORLD_SIZE", ("WORLD_SIZE", "1"): "RANK"}
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
# Numbers of processes that srun and mpirun set, without the ranks that torch needs.
NUM_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
START = "start the run with deepspeed, torchrun or accelerate launch"


def is_first_rank(environment: Mapping[str, str]) -> bool:
    """Return whether a process has rank 0."""
    return environment.get("RANK", "0") == "0"


def check_rank_variables(environment: Mapping[str, str]) -> None:
    """Check that the variables of a launcher fit together, or that there are none.

    Raises:
        UserError: If they do not, for example because a shell or a container still has those of another run.
    """
    if problem := next(_problems(environment), None):
        raise UserError(problem)


def _problems(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield what is wrong; what comes after a problem relies on the problem's absence."""
    for name in NUMBERS:
        if name in environment and not environment[name].isdecimal():
            yield f"{name}={environment[name]}: must be a whole number; unset it, or {START}"
    for (name, harmless), other in PARTNERS.items():
        if environment.get(name, harmless) != harmless and other not in environment:
            yield f"{name}={environment[name]}: is set but {other} is not; unset {name} to train alone, or {START}"
    rank, world_size = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    if rank >= world_size:
        yield f"RANK={rank}: must be below WORLD_SIZE={world_size}; unset both to train alone, or {START}"
    for name in ADDRESS:
        if world_size > 1 and not environment.get(name):
            yield f"WORLD_SIZE={world_size}: {name} is not set; unset WORLD_SIZE and RANK to train alone, or {START}"
    if world_size > 1 and not 0 < int(environment.get("MASTER_PORT", 0)) < 2**16:
        yield f"MASTER_PORT={environment['MASTER_PORT']}: must be between 1 and 65535; choose another port"
    for name in NUM_TASKS:
        if "RANK" not in environment and environment.get(name, "1") not in ("", "0", "1"):
            yield (
                f"{name}={environment[name]}: several processes were started, but RANK is not set, so that each would "
                f"train alone; {START} in one task per machine"
            )
