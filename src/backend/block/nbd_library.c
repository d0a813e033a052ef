/* See nbd_library.h. */
#include "backend/block/nbd_library.h"

#include <dlfcn.h>
#include <pthread.h>

#include "base/log.h"

static struct nbd_library library;
static bool loaded;

static void load(void)
{
    void *handle = dlopen("libnbd.so.0", RTLD_NOW | RTLD_LOCAL);

    if (!handle)
        return;
    loaded = true;
#define NBD_FUNCTION(name) \
    library.name = (__typeof__(library.name))dlsym(handle, "nbd_" #name); \
    loaded = loaded && library.name;
    NBD_FUNCTIONS(NBD_FUNCTION)
#undef NBD_FUNCTION
}

const struct nbd_library *nbd_library(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;

    pthread_once(&once, load);
    if (!loaded)
        log_error("disks on NBD need libnbd 1.14 or newer, which this host does not have; on Debian: apt-get install libnbd0");
    return loaded ? &library : 0;
}
