// The process's threads for C++ work: shared by all models, made when first needed, awake between
// calls that follow each other closely, asleep when idle, and made anew in a child after a fork.

#pragma once

namespace fastgen {

// Calls task(context, index) for each index in [0, num_tasks), on this thread and on at most
// num_threads - 1 of the pool's; returns when all are done, and what they wrote can be read. Tasks
// are claimed one by one, in the order of their indices. They must not throw. Safe from several
// threads at once: while one uses the pool, the others do their tasks themselves; and from a task,
// whose thread does what it calls for itself.
void run_in_parallel(int num_tasks, int num_threads, void (*task)(void*, int), void* context);

}  // namespace fastgen
