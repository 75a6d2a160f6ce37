"""Two solvers of the planner's problem, which agree: a vectorised grid and a MILP."""

from hrm.solvers.grid import SolvedGrid, solve_grid, solved_grid
from hrm.solvers.milp import solve_milp
from hrm.solvers.solution import Solution

__all__ = ["Solution", "SolvedGrid", "solve_grid", "solve_milp", "solved_grid"]
