/* Sizes and constants of snapshot_pack.h's format, for the two files that write and read it. */
#ifndef RINGFORT_VM_SNAPSHOT_PACK_FORMAT_H
#define RINGFORT_VM_SNAPSHOT_PACK_FORMAT_H

#define INDEX_FRAME  0x184d2a5eu        /* a frame that zstd skips */
#define INDEX_MAGIC  "RFMEM 02"
#define INDEX_HEADER 32u
#define CHUNK_ENTRY  12u
#define RUN_ENTRY    8u
#define INDEX_TAIL   24u
/* 8 TiB, in which the index is less than what such a frame can have. */
#define SNAPSHOT_MAX_PAGES (1u << 31)

#endif
