"""Plants faults in the CUDA kernels, one at a time, and counts those that the kernels' tests catch.

``python tools/cuda_emulation/mutants.py [WORD]``: all, or those with the word in their description.
Each fault goes into a copy of csrc/cuda; the tests named beside it are built on the copy and run. A
fault is caught if they fail, end in a fault of the emulation's, or take too long.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from run import CXX, FLAGS, PLAIN, REPOSITORY, Program, torch_includes

FOLDER = Path("build/cuda_emulation/mutants")
SECONDS = 300  # many times what the tests take


@dataclass(frozen=True)
class Mutant:
    kernel: str
    file: str  # in csrc/cuda
    what: str
    old: str
    new: str
    tests: str  # a file of tools/cuda_emulation/kernels

    def __str__(self) -> str:
        return f"{self.kernel}: {self.what}"


MUTANTS = [
    # --- rows
    Mutant(
        "reduce_block",
        "rows/reduce.cuh",
        "no barrier before the warps' states are read",
        "  if (lane == 0) of_warp[warp] = state;\n  __syncthreads();",
        "  if (lane == 0) of_warp[warp] = state;",
        "log_softmax",
    ),
    Mutant(
        "reduce_block",
        "rows/reduce.cuh",
        "no barrier before the next row's states replace them",
        "  // Before the next row's results replace these, which a slower warp may not have read.\n"
        "  __syncthreads();",
        "",
        "log_softmax",
    ),
    Mutant(
        "reduce_block",
        "rows/reduce.cuh",
        "one warp's state is left out",
        "lane < warps ? of_warp[lane]",
        "lane < warps - 1 ? of_warp[lane]",
        "log_softmax",
    ),
    Mutant(
        "reduce_lanes",
        "rows/reduce.cuh",
        "the mask of all lanes for a part of them",
        "(lanes == 32 ? ~0u : (1u << lanes) - 1) << first",
        "~0u",
        "log_softmax",
    ),
    Mutant(
        "reduce_lanes",
        "rows/reduce.cuh",
        "the result of lane 0, of another row",
        "__shfl_sync(mask, value, first)",
        "__shfl_sync(mask, value, 0)",
        "log_softmax",
    ),
    Mutant(
        "reduce_lanes",
        "rows/reduce.cuh",
        "one step of the reduction too few",
        "distance = lanes / 2; distance > 0;",
        "distance = lanes / 2; distance > 1;",
        "log_softmax",
    ),
    Mutant(
        "team_rows_kernel",
        "rows/kernels.cuh",
        "vectors up to one past the last",
        "for (; v < peel.vecs; v += team.size) vecs(",
        "for (; v <= peel.vecs; v += team.size) vecs(",
        "log_softmax",
    ),
    Mutant(
        "team_rows_kernel",
        "rows/kernels.cuh",
        "teams' caches overlap",
        "caches + team_index * ceil_div<int64_t>(classes, kVecSize<T>)",
        "caches + team_index * (classes / kVecSize<T> / 2)",
        "log_softmax",
    ),
    Mutant(
        "Peel",
        "vec.cuh",
        "elements before the boundary left out",
        "return i < head ? i : i + vecs * vec_size;",
        "return i + vecs * vec_size;",
        "log_softmax",
    ),
    Mutant(
        "co_aligned",
        "vec.cuh",
        "takes all operands for aligned alike",
        "return elements_past_boundary(a) % kVecSize<U> == elements_past_boundary(b);",
        "return elements_past_boundary(a) >= 0 || elements_past_boundary(b) >= 0;",
        "log_softmax",
    ),
    Mutant(
        "split_reduce_kernel",
        "rows/kernels.cuh",
        "the last slice as long as the others",
        "    const int64_t row = i / slices, first = i % slices * slice_size;\n"
        "    const int64_t n = min_of(classes - first, slice_size);",
        "    const int64_t row = i / slices, first = i % slices * slice_size;\n"
        "    const int64_t n = slice_size;",
        "log_softmax",
    ),
    Mutant(
        "team_rows_kernel",
        "rows/plan.h",
        "a row's cache takes all shared memory",
        "inline constexpr int64_t kSharedBytes = 48 * 1024 - kReductionBytes;",
        "inline constexpr int64_t kSharedBytes = 48 * 1024;",
        "log_softmax",
    ),
    Mutant(
        "split_reduce_kernel",
        "rows/kernels.cuh",
        "a thread's state instead of the block's",
        "reduce_block(reduce_part<Op, typename Op::T>(op, known, at, first, n, team, nullptr));",
        "reduce_part<Op, typename Op::T>(op, known, at, first, n, team, nullptr);",
        "log_softmax",
    ),
    Mutant(
        "split_finish_kernel",
        "rows/kernels.cuh",
        "merges the states of the row before",
        "state.merge(states[row * slices + s])",
        "state.merge(states[(row > 0 ? row - 1 : 0) * slices + s])",
        "log_softmax",
    ),
    Mutant(
        "split_finish_kernel",
        "rows/kernels.cuh",
        "stops at the 32nd slice",
        "for (int64_t s = threadIdx.x % 32; s < slices; s += 32)",
        "for (int64_t s = threadIdx.x % 32; s < slices && s < 32; s += 32)",
        "log_softmax",
    ),
    Mutant(
        "subwarp_rows_kernel",
        "rows/kernels.cuh",
        "no barrier after the rows are loaded",
        "    __syncthreads();  // rows are read by other threads than those that loaded them\n",
        "",
        "log_softmax",
    ),
    Mutant(
        "subwarp_rows_kernel",
        "rows/kernels.cuh",
        "no barrier before the results are stored",
        "    __syncthreads();  // all results are there; and nobody reads what the next tile "
        "replaces\n",
        "",
        "log_softmax",
    ),
    Mutant(
        "subwarp_rows_kernel",
        "rows/kernels.cuh",
        "no barrier before the next tile",
        "      __syncthreads();  // before the next tile replaces results that another thread "
        "stores\n",
        "",
        "log_softmax",
    ),
    Mutant(
        "subwarp_rows_kernel",
        "rows/kernels.cuh",
        "the last tile has as many rows as the others",
        "const int64_t count = min_of(rows - first, tile_rows);",
        "const int64_t count = tile_rows;",
        "log_softmax",
    ),
    Mutant(
        "strided_rows_kernel",
        "rows/kernels.cuh",
        "threads without a row run too",
        "const bool active = row < rows;",
        "const bool active = row < rows + 1;",
        "log_softmax",
    ),
    Mutant(
        "strided_rows_kernel",
        "rows/kernels.cuh",
        "no barrier before the slices' states are merged",
        "        states[threadIdx.x] = state;\n        __syncthreads();",
        "        states[threadIdx.x] = state;",
        "log_softmax",
    ),
    Mutant(
        "strided_rows_kernel",
        "rows/kernels.cuh",
        "no barrier before the next rows' states",
        "        __syncthreads();  // before the next rows' states replace these\n",
        "",
        "log_softmax",
    ),
    # --- log_softmax
    Mutant(
        "log_softmax",
        "rows/states.cuh",
        "the sum is not made relative to a new maximum",
        "      sum *= std::exp(max - m);\n",
        "",
        "log_softmax",
    ),
    Mutant(
        "log_softmax",
        "log_softmax_kernels.cuh",
        "two subtractions in one",
        "(x[0][j] - row.max) - row.log_sum",
        "x[0][j] - (row.max + row.log_sum)",
        "log_softmax",
    ),
    Mutant(
        "log_softmax backward",
        "log_softmax_kernels.cuh",
        "the operands swapped",
        "x[0][j] - std::exp(x[1][j]) * row.sum",
        "x[1][j] - std::exp(x[0][j]) * row.sum",
        "log_softmax",
    ),
    Mutant(
        "log_softmax backward",
        "log_softmax_kernels.cuh",
        "the sum added",
        "x[0][j] - std::exp(x[1][j]) * row.sum",
        "x[0][j] + std::exp(x[1][j]) * row.sum",
        "log_softmax",
    ),
    # --- losses
    Mutant(
        "class_of_row",
        "loss.cuh",
        "the number of classes for a class",
        "t >= 0 && t < classes;",
        "t >= 0 && t <= classes;",
        "cross_entropy",
    ),
    Mutant(
        "cross_entropy",
        "cross_entropy_kernels.cuh",
        "label smoothing without class weights",
        "        args.weights(c, q);\n      } else {\n        args.spread(c, x[1], q);",
        "        for (int j = 0; j < N; ++j) q[j] = A(1);\n      } else {\n"
        "        args.spread(c, x[1], q);",
        "cross_entropy",
    ),
    Mutant(
        "cross_entropy",
        "cross_entropy_kernels.cuh",
        "an ignored row counts in the total weight",
        "        loss = weight = A(0);",
        "        loss = A(0);",
        "cross_entropy",
    ),
    Mutant(
        "cross_entropy backward",
        "cross_entropy_kernels.cuh",
        "the class beside the target",
        "if (c.at(j) == row.target) q[j] += row.at_target;",
        "if (c.at(j) == row.target + 1) q[j] += row.at_target;",
        "cross_entropy",
    ),
    Mutant(
        "cross_entropy backward",
        "cross_entropy_kernels.cuh",
        "an ignored row has a gradient",
        "return row.target < 0;",
        "return false;",
        "cross_entropy",
    ),
    Mutant(
        "cross_entropy with its gradient",
        "cross_entropy_kernels.cuh",
        "the gradient isn't divided by the total weight",
        "total_weight ? scale * reciprocal(*total_weight) : scale;",
        "scale;",
        "cross_entropy",
    ),
    Mutant(
        "cross_entropy with its gradient",
        "cross_entropy_kernels.cuh",
        "an ignored row has a gradient",
        "return row.gradient.target < 0;",
        "return false;",
        "cross_entropy",
    ),
    Mutant(
        "cross_entropy with its gradient",
        "cross_entropy_kernels.cuh",
        "the sum of q without label smoothing's share",
        "total = Forward::kIndices ? this->args.uniform * state.q : state.q;",
        "total = Forward::kIndices ? A(0) : state.q;",
        "cross_entropy",
    ),
    Mutant(
        "cross_entropy with a copy",
        "cross_entropy_kernels.cuh",
        "the first of a vector in the place of all",
        "for (int j = 0; j < N; ++j) out[j] = x[0][j];",
        "for (int j = 0; j < N; ++j) out[j] = x[0][0];",
        "cross_entropy",
    ),
    Mutant(
        "scaled gradient",
        "cross_entropy_kernels.cuh",
        "an ignored row takes its factor",
        "return row.ignored;",
        "return false;",
        "cross_entropy",
    ),
    Mutant(
        "scaled gradient",
        "cross_entropy_kernels.cuh",
        "a factor of 1 is not noticed",
        "return in_place && !grad.per_row && grad.of(0) == A(1);",
        "return in_place && !grad.per_row && grad.of(0) == A(2);",
        "cross_entropy",
    ),
    Mutant(
        "scaled gradient",
        "cross_entropy_kernels.cuh",
        "a new tensor is left unwritten where the factor is 1",
        "return in_place && !grad.per_row && grad.of(0) == A(1);",
        "return !grad.per_row;",
        "cross_entropy",
    ),
    Mutant(
        "sum_target_weights_kernel",
        "cross_entropy_kernels.cuh",
        "one thread's sum instead of the block's",
        "  sums = reduce_block(sums);\n  if (threadIdx.x == 0) sums_of_block[blockIdx.x] = sums;",
        "  if (threadIdx.x == 0) sums_of_block[blockIdx.x] = sums;",
        "cross_entropy",
    ),
    Mutant(
        "sum_target_weights_kernel",
        "cross_entropy_kernels.cuh",
        "each block sums all rows",
        "int64_t(gridDim.x) * blockDim.x;\n#pragma unroll 4",
        "int64_t(blockDim.x);\n#pragma unroll 4",
        "cross_entropy",
    ),
    Mutant(
        "sum_class_weights_kernel",
        "cross_entropy_kernels.cuh",
        "every class but the first of each thread",
        "for (int64_t c = threadIdx.x; c < classes; c += blockDim.x) {\n    state.sum",
        "for (int64_t c = threadIdx.x + blockDim.x; c < classes; c += blockDim.x) {\n    state.sum",
        "cross_entropy",
    ),
    Mutant(
        "sum_class_weights_kernel",
        "cross_entropy_kernels.cuh",
        "one thread's sum instead of the block's",
        "  state = reduce_block(state);\n  if (threadIdx.x == 0) *result",
        "  if (threadIdx.x == 0) *result",
        "cross_entropy",
    ),
    Mutant(
        "nll_loss_kernel",
        "nll_loss_kernels.cuh",
        "rows beyond the last",
        "t[u] = row < args.rows ? class_of_row",
        "t[u] = row <= args.rows ? class_of_row",
        "nll_loss",
    ),
    Mutant(
        "nll_loss_kernel",
        "nll_loss_kernels.cuh",
        "each block starts at the first row",
        "for (int64_t base = blockIdx.x * kRowsAtOnce; base",
        "for (int64_t base = 0; base",
        "nll_loss",
    ),
    Mutant(
        "nll_loss backward",
        "nll_loss_kernels.cuh",
        "the target's sign",
        "t < 0 ? A(0) : -class_weight_at(weight, t) * grad.of(position)",
        "t < 0 ? A(0) : class_weight_at(weight, t) * grad.of(position)",
        "nll_loss",
    ),
    Mutant(
        "nll_loss backward",
        "nll_loss_kernels.cuh",
        "no class weights",
        "t < 0 ? A(0) : -class_weight_at(weight, t) * grad.of(position)",
        "t < 0 ? A(0) : -grad.of(position)",
        "nll_loss",
    ),
    Mutant(
        "finish_loss_kernel",
        "loss.cuh",
        "the sums of the first blocks only",
        "for (int64_t i = threadIdx.x; i < blocks; i += blockDim.x) sums.merge(of_block[i]);",
        "if (threadIdx.x < blocks && threadIdx.x < 1) sums.merge(of_block[threadIdx.x]);",
        "nll_loss",
    ),
    Mutant(
        "finish_loss_kernel",
        "loss.cuh",
        "the mean of nothing is 0",
        "sums.weight == 0 ? std::numeric_limits<double>::quiet_NaN()",
        "sums.weight == 0 ? 0.0",
        "nll_loss",
    ),
    # --- linear_relu
    Mutant(
        "gemm_kernel",
        "gemm.cuh",
        "no barrier before the first tiles are read",
        "    // Before anyone reads what others have stored.\n    __syncthreads();",
        "",
        "gemm",
    ),
    Mutant(
        "gemm_kernel",
        "gemm.cuh",
        "no barrier between two steps",
        "      store(buffer);\n      __syncthreads();",
        "      store(buffer);",
        "gemm",
    ),
    Mutant(
        "gemm_kernel",
        "gemm.cuh",
        "one buffer for two steps",
        "buffer = 1 - buffer;",
        "buffer = buffer;",
        "gemm",
    ),
    Mutant(
        "gemm_kernel",
        "gemm.cuh",
        "the last step as deep as the others",
        "const int end = int(min_of<int64_t>(depths, kStep));",
        "const int end = kStep + int(0 * depths);",
        "gemm",
    ),
    Mutant(
        "gemm_kernel",
        "gemm.cuh",
        "rows beyond the last are written",
        "        if (r >= args.rows) continue;\n",
        "",
        "gemm",
    ),
    Mutant(
        "gemm_kernel",
        "gemm.cuh",
        "the sum is rounded to the storage type before the bias",
        "epilogue(totals_[i][j + k] + bias[k], args.relu)",
        "epilogue(A(T(totals_[i][j + k])) + bias[k], args.relu)",
        "gemm",
    ),
    Mutant(
        "relu_backward_kernel",
        "linear_relu_kernels.cuh",
        "the gradient passes where the output is 0",
        "A(output_value) <= 0 ? T(0)",
        "A(output_value) < 0 ? T(0)",
        "linear_relu",
    ),
    Mutant(
        "relu_backward_kernel",
        "linear_relu_kernels.cuh",
        "no barrier between the steps of the block's sums",
        "    // Before the upper half's sums are read: they were written at the start or one turn "
        "ago.\n    __syncthreads();\n    if (int(threadIdx.y) < half) {\n      const A* theirs",
        "    if (int(threadIdx.y) < half) {\n      const A* theirs",
        "linear_relu",
    ),
    Mutant(
        "relu_backward_kernel",
        "linear_relu_kernels.cuh",
        "a vector that sticks out at the end of the row",
        "const bool whole = col >= 0 && col + kWidth <= args.cols;",
        "const bool whole = col >= 0 && col < args.cols;",
        "linear_relu",
    ),
    Mutant(
        "column_sums_kernel",
        "linear_relu_kernels.cuh",
        "the rows of a thread above twice",
        "for (int64_t r = threadIdx.y; r < rows; r += kSumRows)",
        "for (int64_t r = threadIdx.y; r < rows; r += kSumRows / 2)",
        "linear_relu",
    ),
    Mutant(
        "column_sums_kernel",
        "linear_relu_kernels.cuh",
        "the tail unguarded",
        "if (threadIdx.y == 0 && col < cols) sums[col]",
        "if (threadIdx.y == 0) sums[col]",
        "linear_relu",
    ),
    # --- sgd
    Mutant(
        "sgd_step_kernel",
        "multi_tensor.cuh",
        "the tensor before",
        "if (tensors.first_block[middle] <= block) {",
        "if (tensors.first_block[middle] < block) {",
        "sgd",
    ),
    Mutant(
        "sgd_step_kernel",
        "sgd_kernels.cuh",
        "vectors start at the first element, aligned or not",
        "const int before = elements_past_boundary(at.param);",
        "const int before = 0;",
        "sgd",
    ),
    Mutant(
        "sgd_step_kernel",
        "sgd_kernels.cuh",
        "elements beyond the end",
        "if (j >= 0 && j < n) at.step_element(step, j);",
        "if (j >= 0 && j <= n) at.step_element(step, j);",
        "sgd",
    ),
    Mutant(
        "sgd_step_kernel",
        "sgd_kernels.cuh",
        "a first step is dampened",
        "buffer = is_first_step ? direction : momentum * buffer + keep * direction;",
        "buffer = momentum * buffer + keep * direction;",
        "sgd",
    ),
    Mutant(
        "sgd_step_kernel",
        "sgd_kernels.cuh",
        "weight decay in the storage type",
        "direction += weight_decay * param;",
        "direction += A(float(c10::BFloat16(float(weight_decay)))) * param;",
        "sgd",
    ),
    Mutant(
        "sgd_step_kernel",
        "sgd_kernels.cuh",
        "the first vector of a wider buffer in place of the second",
        "b[v] = load_vec(buffer + i + v * kVecSize<B>, /*aligned=*/true);",
        "b[v] = load_vec(buffer + i, /*aligned=*/true);",
        "sgd",
    ),
    Mutant(
        "sgd_step_kernel",
        "sgd_kernels.cuh",
        "a wider buffer rounded to the parameter's type",
        "stored = B(bj);",
        "stored = B(T(bj));",
        "sgd",
    ),
    Mutant(
        "sgd_step_kernel",
        "sgd_kernels.cuh",
        "found_inf is not looked at",
        "if (args.found_inf.value_or(0) != 0) return;",
        "",
        "sgd",
    ),
]


def objects_without_tests() -> list[str]:
    """What each mutant's program is linked with: the runtime and main()."""
    program = Program("kernels", PLAIN)
    program.folder.mkdir(parents=True, exist_ok=True)
    common = [c for c in program.commands() if Path(c[-1]).stem in COMMON]
    for command in common:
        subprocess.run(command, check=True)
    return [command[-1] for command in common]


COMMON = ("main", "runtime", "block", "fiber")


def plant(mutant: Mutant, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree("csrc/cuda", folder / "cuda")
    path = folder / "cuda" / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        sys.exit(f"mutants.py: {mutant.file} has not exactly one place to plant: {mutant}")
    path.write_text(text.replace(mutant.old, mutant.new))


def build_tests(name: str, folder: Path, objects: list[str]) -> Path:
    """Of one file, on the sources in the folder before those in csrc."""
    source = Path("tools/cuda_emulation/kernels") / f"{name}.cpp"
    output = folder / f"{name}.o"
    flags = [*PLAIN.flags, "-w", f"-I{folder}", *FLAGS, *torch_includes()]
    subprocess.run([*CXX, *flags, "-c", str(source), "-o", str(output)], check=True)
    program = folder / "tests"
    subprocess.run([*CXX, "-pthread", str(output), *objects, "-o", str(program)], check=True)
    return program


def outcome(program: Path) -> str:
    """The first line of what the tests say as they fail; empty where they pass."""
    try:
        process = subprocess.run(
            [program], capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not done after {SECONDS} s"
    if process.returncode == 0:
        return ""
    return (process.stderr.splitlines() or [f"status {process.returncode}"])[0]


def try_mutant(number: int, mutant: Mutant, objects: list[str]) -> bool:
    folder = FOLDER / str(number)
    plant(mutant, folder)
    message = outcome(build_tests(mutant.tests, folder, objects))
    print(f"{'caught' if message else 'MISSED'}  {mutant}\n        {message[:150]}", flush=True)
    return bool(message)


def check_unchanged(names: set[str], objects: list[str]) -> None:
    """What fails without a fault would catch any."""
    for name in sorted(names):
        folder = FOLDER / f"unchanged_{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if message := outcome(build_tests(name, folder, objects)):
            sys.exit(f"mutants.py: the tests of {name} fail without a planted fault: {message}")


def main() -> None:
    os.chdir(REPOSITORY)
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    mutants = [mutant for mutant in MUTANTS if word in str(mutant)]
    if not mutants:
        sys.exit(f"mutants.py: no planted fault is named {word!r}")
    for number, mutant in enumerate(mutants):
        plant(mutant, FOLDER / str(number))  # all of them first: a stale one is found at once
    objects = objects_without_tests()
    check_unchanged({mutant.tests for mutant in mutants}, objects)
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        numbers = range(len(mutants))
        caught = sum(pool.map(lambda i: try_mutant(i, mutants[i], objects), numbers))
    print(f"{caught} of {len(mutants)} planted faults caught")
    sys.exit(caught != len(mutants))


if __name__ == "__main__":
    main()
