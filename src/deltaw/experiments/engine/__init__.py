"""What the experiments are run with: the harness, the search for learning rates, the statistics of a record.

    harness, record, machine          a record, cell by cell, and where it was made
    tuning, trained, subjects         competitors tuned alike, trained in banks, on a task by its name
    ends, starts                      what stands beside the adapters: nothing and everything trained; starts kept
    verdicts, two_level, sensitivity  what a tuned record says
    decomposition                     for `dora_directions`: lengths and directions of weights
    step, dora_step                   for `step_cost`, `dora_detach`: what a step costs
    merged_runs, side_by_side         for `appendix_runs`: many optimizers, many runs, one model
"""
