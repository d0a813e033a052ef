/*
 * A machine's state as a file: a header that says what it is and whether it is whole, and the stream of vm/state.h.
 *
 *   0   16 bytes  "ringfort machine"
 *   16  u32       version of this layout: 1
 *   20  u32       CRC-32 of the stream
 *   24  u64       length of the stream, which ends the file
 * Little-endian. One thread.
 */
#ifndef RINGFORT_VM_STATE_FILE_H
#define RINGFORT_VM_STATE_FILE_H

#include <stddef.h>

/* Writes and syncs a new file name in the folder dirfd. path: for messages. 0 or a negative errno (logged). */
int state_file_write(int dirfd, const char *name, const char *path, const void *stream, size_t len);
/*
 * Reads it whole: *stream is malloc'ed and belongs to the caller. 0, -EINVAL when it is not such a file, too new, cut short or
 * damaged, or another negative errno (all logged).
 */
int state_file_read(int dirfd, const char *name, const char *path, void **stream, size_t *len);

#endif
