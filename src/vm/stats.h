/*
 * The figures of a run that --stats writes: one JSON object, at exit.
 *
 *   engine                              name of the engine that ran last
 *   guest_instructions                  retired by all vCPUs
 *   wall_seconds, cpu_seconds           since vm_stats_create(); CPU time of the whole process, and
 *                                       of those that run user code natively
 *   vcpu_cpu_seconds                    CPU time of the vCPU threads and those processes alone
 *   instructions_per_second             guest_instructions / vcpu_cpu_seconds: an idle guest does
 * not dilute it seconds_to_first_user_instruction   guest time; null: never reached exits {cause:
 * count} engine_counters                     {name: count} devices                             {id:
 * {name: count}} peak_rss_beyond_ram_bytes           base/resident.h says how; sampled every 100
 * ms, at the end, and wherever much memory is given back. null: the host does not tell
 *
 * Event loop's thread, or before and after it runs.
 */
#ifndef RINGFORT_VM_STATS_H
#define RINGFORT_VM_STATS_H

#include <stdint.h>

struct engine_counters;
struct loop;
struct vm_stats;

/*
 * Starts the clocks and the sampling by a timer of the loop (loop NULL: samples are
 * vm_stats_sample()'s only). file is borrowed; that it can be written is checked now: 0 or the
 * negative errno (logged).
 */
int vm_stats_create(struct loop *loop, const char *file, struct vm_stats **out);
/* NULL is allowed. Before the loop ends. */
void vm_stats_destroy(struct vm_stats *s);

void vm_stats_set_engine(struct vm_stats *s, const char *name);
/* Adds what one vCPU did; cpu_ns: CPU time of its thread. */
void vm_stats_add_vcpu(struct vm_stats *s, const struct engine_counters *c, uint64_t cpu_ns);
/* Adds to a number at a path of keys: "devices/virtio-blk0/reads". */
void vm_stats_add(struct vm_stats *s, const char *path, uint64_t value);
/* Takes the last figures and writes the file: whole or not at all (a rename), unless it is a pipe
 * or terminal. 0 or a negative errno (logged). */
int vm_stats_write(struct vm_stats *s);

#endif
