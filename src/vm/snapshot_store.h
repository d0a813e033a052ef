/*
 * Where snapshots and the disks of restored machines are kept: $XDG_DATA_HOME/ringfort (~/.local/share/ringfort), in
 * snapshots/NAME and machines/NAME. For the snapshot_*.c files only.
 *
 * A snapshot is made in a folder snapshots/.new-NAME-XXXXXX that its maker holds locked, and gets its name when it is whole and
 * on disk. A folder of that kind that nobody holds is what a killed save left, and is removed by the next one.
 */
#ifndef RINGFORT_VM_SNAPSHOT_STORE_H
#define RINGFORT_VM_SNAPSHOT_STORE_H

#include <jansson.h>
#include <limits.h>
#include <stdbool.h>
#include <stdint.h>

#define SNAPSHOT_STATE  "state"
#define SNAPSHOT_MEMORY "memory"
#define SNAPSHOT_META   "snapshot.json"

struct memory;

/*
 * Where a region's bytes begin in the memory file: one after the other, each on a multiple of 2 MiB. region may be how many there are: the
 * file's size.
 */
uint64_t snapshot_region_offset(const struct memory *m, unsigned region);

/* 0, or -EINVAL (logged: what is wrong with it). */
int snapshot_check_name(const char *name);
/* Opens DATA/kind ("snapshots", "machines"), making it when it is not there; path gets its name. A descriptor or a negative errno (logged). */
int snapshot_open_root(const char *kind, char path[PATH_MAX]);
/*
 * Makes DATA/machines/NAME, for the disks of a machine; what is there of an earlier machine of that name is kept in a folder beside
 * it, but for files that were never finished (their names end with SNAPSHOT_PARTIAL). path gets its name. A descriptor or a negative errno (logged).
 */
#define SNAPSHOT_PARTIAL ".partial"
int snapshot_make_machine_folder(const char *name, char path[PATH_MAX]);
/* Removes the folder name in dirfd with all that is in it. 0 or a negative errno (silent). */
int snapshot_remove_tree(int dirfd, const char *name);
/*
 * Files below the overlays of a folder have names that begin so. They are links, so they live as long as somebody needs them.
 * snapshot_link_bases() links all of from's into to as well. 0 or a negative errno (logged); path: from's, for messages.
 */
#define SNAPSHOT_BASE_PREFIX "base-"
int snapshot_link_bases(int from, int to, const char *path);
/* Removes what killed saves left. */
void snapshot_sweep(int root);
/*
 * What snapshot.json says as version. 1: as long as RAM is not packed; 2: it is, as snapshot_pack.h says (packed ones of version 1 were so
 * otherwise, and are not read any more).
 */
static inline int snapshot_version(bool packed) { return packed ? 2 : 1; }
/* snapshot.json of the snapshot, checked; a new reference, or NULL (logged, unless quiet). */
json_t *snapshot_read_meta(int root, const char *name, const char *path, bool quiet);
/* Writes and syncs it. 0 or a negative errno (logged). */
int snapshot_write_meta(int dirfd, const char *path, const json_t *meta);

#endif
