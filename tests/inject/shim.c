/* A library that is loaded before the C library: counts the calls on files below one directory, and lets one of them fail.
 *
 * The state is shared by a process and those that it forks: the parent arms it and reads it. Calls are named as in
 * table.py. Only what CPython and ctypes call is wrapped; a test compares that with what strace sees.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <unistd.h>

#define RECORDS 20000
#define NAME 32
#define WHERE 96

enum { FAIL = 1, HALF = 2, ONE = 3, ZERO = 4, KILL = 5 };

struct state {
    atomic_int armed;        /* 0: calls pass by; 1: they are counted, and may fail */
    char root[PATH_MAX];     /* only files below this directory count */
    int watched;             /* a descriptor that counts too, -1: none */
    char call[NAME];         /* the call that fails, "": none, "*": any */
    int nth;                 /* which one, from 1 */
    int lasting;             /* and all after it, too */
    int what;                /* FAIL, HALF, ONE, ZERO, KILL: the process ends */
    int number;              /* errno for FAIL */
    atomic_int seen;
    atomic_int failed;
    atomic_int recorded;
    struct { char call[NAME]; char where[WHERE]; } records[RECORDS];
};

static struct state *state;

__attribute__((constructor)) static void begin(void)
{
    state = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

void inject_arm(const char *root, int watched, const char *call, int nth, int lasting, int what, int number)
{
    snprintf(state->root, sizeof state->root, "%s", root);
    snprintf(state->call, sizeof state->call, "%s", call);
    state->watched = watched;
    state->nth = nth;
    state->lasting = lasting;
    state->what = what;
    state->number = number;
    state->seen = state->failed = state->recorded = 0;
    state->armed = 1;
}

void inject_disarm(void) { state->armed = 0; }
int inject_failed(void) { return state->failed; }
int inject_recorded(void) { return state->recorded < RECORDS ? state->recorded : RECORDS; }
const char *inject_call(int i) { return state->records[i].call; }
const char *inject_where(int i) { return state->records[i].where; }

/* -- which files count */

static int below(const char *path)
{
    size_t length = strlen(state->root);
    return !strncmp(path, state->root, length) && (path[length] == '/' || !path[length] || path[length] == ' ');
}

static int path_of(int fd, char *path)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlink, link, path, PATH_MAX - 1);
    path[length > 0 ? length : 0] = 0;
    return length > 0;
}

static int whole(int directory, const char *name, char *path)
{
    char base[PATH_MAX];
    if (name && name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
        return 1;
    }
    if (directory == AT_FDCWD) {
        if (syscall(SYS_getcwd, base, sizeof base) < 0)
            return 0;
    } else if (!path_of(directory, base))
        return 0;
    return snprintf(path, PATH_MAX, "%s%s%s", base, name && *name ? "/" : "", name ? name : "") > 0;
}

/* Returns what is to happen to a call on a file that counts: 0 nothing, or one of the above. */
static int step(const char *call, const char *path)
{
    int at = atomic_fetch_add(&state->recorded, 1);
    if (at < RECORDS) {
        const char *tail = path + strlen(state->root);
        snprintf(state->records[at].call, NAME, "%s", call);
        snprintf(state->records[at].where, WHERE, "%s", below(path) ? tail : path);
    }
    if (strcmp(state->call, "*") && strcmp(call, state->call))
        return 0;
    int seen = atomic_fetch_add(&state->seen, 1) + 1;
    if (seen != state->nth && !(state->lasting && seen > state->nth))
        return 0;
    atomic_fetch_add(&state->failed, 1);
    if (state->what == KILL)
        _exit(137);
    return state->what;
}

static int at_fd(const char *call, int fd)
{
    char path[PATH_MAX];
    int kept = errno, what = 0;
    if (state && state->armed && path_of(fd, path) && (below(path) || fd == state->watched))
        what = step(call, path);
    errno = kept;
    return what;
}

static int at_paths(const char *call, int directory, const char *name, int there, const char *other)
{
    char path[PATH_MAX];
    int kept = errno, what = 0;
    if (state && state->armed)
        if ((whole(directory, name, path) && below(path)) || (whole(there, other, path) && below(path)))
            what = step(call, path);
    errno = kept;
    return what;
}

static int at_path(const char *call, int directory, const char *name)
{
    char path[PATH_MAX];
    int kept = errno, what = 0;
    if (state && state->armed && whole(directory, name, path) && below(path))
        what = step(call, path);
    errno = kept;
    return what;
}

#define NEXT(name) \
    static __typeof__(name) *next; \
    if (!next) next = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define FAILS(test, bad) \
    do { if (test) { errno = state->number; return bad; } } while (0)

/* -- calls that either succeed or fail */

#define ON_FD(type, name, call, bad, parameters, arguments) \
    type name parameters { NEXT(name); FAILS(at_fd(call, fd), bad); return next arguments; }
#define ON_PATH(type, name, call, bad, parameters, directory, arguments) \
    type name parameters { NEXT(name); FAILS(at_path(call, directory, path), bad); return next arguments; }

#define ON_PATHS(type, name, call, parameters, one, other, arguments) \
    type name parameters { NEXT(name); FAILS(at_paths(call, one, path, other, to), -1); return next arguments; }

ON_FD(int, fsync, "fsync", -1, (int fd), (fd))
ON_FD(int, fdatasync, "fdatasync", -1, (int fd), (fd))
ON_FD(int, flock, "flock", -1, (int fd, int how), (fd, how))
ON_FD(int, ftruncate64, "ftruncate", -1, (int fd, off64_t size), (fd, size))
ON_FD(int, fchmod, "fchmod", -1, (int fd, mode_t mode), (fd, mode))
ON_FD(int, fchown, "fchown", -1, (int fd, uid_t user, gid_t group), (fd, user, group))
ON_FD(int, fstat64, "stat", -1, (int fd, struct stat64 *to), (fd, to))
ON_FD(int, fstatvfs64, "statfs", -1, (int fd, struct statvfs64 *to), (fd, to))
ON_FD(int, dup, "dup", -1, (int fd), (fd))
ON_FD(int, fchdir, "fchdir", -1, (int fd), (fd))
ON_FD(int, futimens, "utimensat", -1, (int fd, const struct timespec times[2]), (fd, times))
ON_FD(int, fsetxattr, "setxattr", -1, (int fd, const char *name, const void *value, size_t size, int flags),
      (fd, name, value, size, flags))
ON_FD(int, fremovexattr, "removexattr", -1, (int fd, const char *name), (fd, name))
ON_FD(ssize_t, fgetxattr, "getxattr", -1, (int fd, const char *name, void *value, size_t size),
      (fd, name, value, size))
ON_FD(ssize_t, flistxattr, "listxattr", -1, (int fd, char *list, size_t size), (fd, list, size))
ON_FD(DIR *, fdopendir, "fdopendir", NULL, (int fd), (fd))
ON_FD(int, fallocate, "fallocate", -1, (int fd, int mode, off_t offset, off_t length), (fd, mode, offset, length))
ON_FD(int, fallocate64, "fallocate", -1, (int fd, int mode, off64_t offset, off64_t length),
      (fd, mode, offset, length))

ON_PATH(int, stat64, "stat", -1, (const char *path, struct stat64 *to), AT_FDCWD, (path, to))
ON_PATH(int, lstat64, "stat", -1, (const char *path, struct stat64 *to), AT_FDCWD, (path, to))
ON_PATH(int, fstatat64, "stat", -1, (int at, const char *path, struct stat64 *to, int flags), at,
        (at, path, to, flags))
ON_PATH(int, statvfs64, "statfs", -1, (const char *path, struct statvfs64 *to), AT_FDCWD, (path, to))
ON_PATH(int, access, "access", -1, (const char *path, int mode), AT_FDCWD, (path, mode))
ON_PATH(int, faccessat, "access", -1, (int at, const char *path, int mode, int flags), at, (at, path, mode, flags))
ON_PATH(int, unlink, "unlink", -1, (const char *path), AT_FDCWD, (path))
ON_PATH(int, unlinkat, "unlink", -1, (int at, const char *path, int flags), at, (at, path, flags))
ON_PATH(int, rmdir, "rmdir", -1, (const char *path), AT_FDCWD, (path))
ON_PATH(int, mkdir, "mkdir", -1, (const char *path, mode_t mode), AT_FDCWD, (path, mode))
ON_PATH(int, mkdirat, "mkdir", -1, (int at, const char *path, mode_t mode), at, (at, path, mode))
ON_PATHS(int, rename, "rename", (const char *path, const char *to), AT_FDCWD, AT_FDCWD, (path, to))
ON_PATHS(int, renameat, "rename", (int at, const char *path, int there, const char *to), at, there,
         (at, path, there, to))
ON_PATHS(int, renameat2, "renameat2", (int at, const char *path, int there, const char *to, unsigned flags), at, there,
         (at, path, there, to, flags))
ON_PATHS(int, link, "link", (const char *path, const char *to), AT_FDCWD, AT_FDCWD, (path, to))
ON_PATHS(int, linkat, "link", (int at, const char *path, int there, const char *to, int flags), at, there,
         (at, path, there, to, flags))
ON_PATH(ssize_t, readlink, "readlink", -1, (const char *path, char *to, size_t size), AT_FDCWD, (path, to, size))
ON_PATH(ssize_t, readlinkat, "readlink", -1, (int at, const char *path, char *to, size_t size), at,
        (at, path, to, size))
ON_PATH(int, utimensat, "utimensat", -1, (int at, const char *path, const struct timespec times[2], int flags), at,
        (at, path, times, flags))
ON_PATH(int, chmod, "chmod", -1, (const char *path, mode_t mode), AT_FDCWD, (path, mode))
ON_PATH(int, chown, "chown", -1, (const char *path, uid_t user, gid_t group), AT_FDCWD, (path, user, group))
ON_PATH(int, lchown, "chown", -1, (const char *path, uid_t user, gid_t group), AT_FDCWD, (path, user, group))
ON_PATH(DIR *, opendir, "open", NULL, (const char *path), AT_FDCWD, (path))
ON_PATH(ssize_t, getxattr, "getxattr", -1, (const char *path, const char *name, void *value, size_t size), AT_FDCWD,
        (path, name, value, size))
ON_PATH(ssize_t, lgetxattr, "getxattr", -1, (const char *path, const char *name, void *value, size_t size), AT_FDCWD,
        (path, name, value, size))
ON_PATH(ssize_t, listxattr, "listxattr", -1, (const char *path, char *list, size_t size), AT_FDCWD, (path, list, size))
ON_PATH(ssize_t, llistxattr, "listxattr", -1, (const char *path, char *list, size_t size), AT_FDCWD, (path, list, size))

int posix_fadvise64(int fd, off64_t offset, off64_t length, int advice)
{
    NEXT(posix_fadvise64);
    /* Returns the error instead of setting it. */
    return at_fd("fadvise64", fd) ? state->number : next(fd, offset, length, advice);
}

/* As in Linux, the descriptor is closed whatever close says. */
int close(int fd)
{
    NEXT(close);
    int what = at_fd("close", fd), done = next(fd);
    FAILS(what, -1);
    return done;
}

struct dirent64 *readdir64(DIR *directory)
{
    NEXT(readdir64);
    FAILS(at_fd("getdents64", dirfd(directory)), NULL);
    return next(directory);
}

int open64(const char *path, int flags, ...)
{
    NEXT(open64);
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    FAILS(at_path("open", AT_FDCWD, path), -1);
    return next(path, flags, mode);
}

int openat64(int at, const char *path, int flags, ...)
{
    NEXT(openat64);
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    FAILS(at_path("open", at, path), -1);
    return next(at, path, flags, mode);
}

/* ctypes calls this for what the C library has no function for. */
long syscall(long number, ...)
{
    static long (*next)(long, ...);
    if (!next)
        next = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    va_list more;
    long a[6];
    va_start(more, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(more, long);
    va_end(more);
    if (number == SYS_openat2)
        FAILS(at_path("openat2", (int)a[0], (const char *)a[1]), -1);
    if (number == SYS_renameat2)
        FAILS(at_paths("renameat2", (int)a[0], (const char *)a[1], (int)a[2], (const char *)a[3]), -1);
    return next(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

/* -- calls of many purposes */

struct named { unsigned long number; const char *call; };

static const struct named IOCTLS[] = {
    {0x4020940D, "ioctl:FICLONERANGE"}, {0x40049409, "ioctl:FICLONE"}, {0xC020660B, "ioctl:FIEMAP"},
    {0x80086601, "ioctl:GETFLAGS"}, {0x40086602, "ioctl:SETFLAGS"}, {0x80087601, "ioctl:GETVERSION"},
    {0x8400941F, "ioctl:BTRFS_FS_INFO"}, {0x80111500, "ioctl:GETFSUUID"},
    {0x40305828, "ioctl:RESVSP"}, {0x4030582B, "ioctl:UNRESVSP"},
    {0x541B, "ioctl:FIONREAD"}, {0x5401, "ioctl:TCGETS"}, {0x5413, "ioctl:TIOCGWINSZ"},
    {0x125E, "ioctl:BLKROGET"}, {0x1268, "ioctl:BLKSSZGET"}, {0x4C05, "ioctl:LOOP_GET_STATUS64"}, {0, NULL}};

static const struct named FCNTLS[] = {
    {F_OFD_SETLK, "fcntl:OFD_SETLK"}, {F_OFD_SETLKW, "fcntl:OFD_SETLK"}, {F_OFD_GETLK, "fcntl:OFD_GETLK"},
    {F_SETLEASE, "fcntl:SETLEASE"}, {F_GETLEASE, "fcntl:GETLEASE"}, {F_SETPIPE_SZ, "fcntl:SETPIPE_SZ"},
    {F_GETFL, "fcntl:GETFL"}, {F_SETFL, "fcntl:SETFL"}, {F_DUPFD_CLOEXEC, "fcntl:DUPFD"}, {F_GETFD, "fcntl:GETFD"},
    {F_SETFD, "fcntl:SETFD"}, {0, NULL}};

static const struct named SEEKS[] = {
    {SEEK_SET, "lseek:SET"}, {SEEK_CUR, "lseek:CUR"}, {SEEK_END, "lseek:END"}, {SEEK_DATA, "lseek:DATA"},
    {SEEK_HOLE, "lseek:HOLE"}, {0, NULL}};

static const char *named(const struct named *table, unsigned long number, const char *other)
{
    for (; table->call; table++)
        if (table->number == number)
            return table->call;
    return other;
}

int ioctl(int fd, unsigned long request, ...)
{
    NEXT(ioctl);
    va_list more;
    va_start(more, request);
    void *argument = va_arg(more, void *);
    va_end(more);
    FAILS(at_fd(named(IOCTLS, request, "ioctl:other"), fd), -1);
    return next(fd, request, argument);
}

int fcntl64(int fd, int command, ...)
{
    NEXT(fcntl64);
    va_list more;
    va_start(more, command);
    void *argument = va_arg(more, void *);
    va_end(more);
    FAILS(at_fd(named(FCNTLS, command, "fcntl:other"), fd), -1);
    return next(fd, command, argument);
}

int isatty(int fd)
{
    NEXT(isatty);
    FAILS(at_fd("ioctl:TCGETS", fd), 0);
    return next(fd);
}

off64_t lseek64(int fd, off64_t offset, int whence)
{
    NEXT(lseek64);
    FAILS(at_fd(named(SEEKS, whence, "lseek:other"), fd), -1);
    return next(fd, offset, whence);
}

/* -- calls that may do less than was asked for */

static size_t less(int what, size_t length)
{
    return what == HALF ? (length + 1) / 2 : what == ONE ? (length ? 1 : 0) : length;
}

#define SHORT(call, length) \
    int what = at_fd(call, fd); \
    FAILS(what == FAIL, -1); \
    if (what == ZERO) return 0; \
    length = less(what, length)

ssize_t read(int fd, void *to, size_t length) { NEXT(read); SHORT("read", length); return next(fd, to, length); }
ssize_t write(int fd, const void *from, size_t length)
{
    NEXT(write);
    SHORT("write", length);
    return next(fd, from, length);
}
ssize_t pread64(int fd, void *to, size_t length, off64_t offset)
{
    NEXT(pread64);
    SHORT("pread64", length);
    return next(fd, to, length, offset);
}
ssize_t pwrite64(int fd, const void *from, size_t length, off64_t offset)
{
    NEXT(pwrite64);
    SHORT("pwrite64", length);
    return next(fd, from, length, offset);
}
ssize_t sendfile64(int fd, int from, off64_t *offset, size_t length)
{
    NEXT(sendfile64);
    int what = at_fd("sendfile", from);
    FAILS(what == FAIL, -1);
    if (what == ZERO) return 0;
    return next(fd, from, offset, less(what, length));
}
ssize_t copy_file_range(int fd, off64_t *offset, int to, off64_t *there, size_t length, unsigned flags)
{
    NEXT(copy_file_range);
    SHORT("copy_file_range", length);
    return next(fd, offset, to, there, length, flags);
}

#define VECTORS 1024

static int cut(struct iovec *to, const struct iovec *from, int count, int what)
{
    size_t total = 0, left;
    for (int i = 0; i < count; i++)
        total += from[i].iov_len;
    left = less(what, total);
    for (int i = 0; i < count; i++) {
        to[i] = from[i];
        if (to[i].iov_len > left)
            to[i].iov_len = left;
        left -= to[i].iov_len;
    }
    return count;
}

#define VECTORED(name, call, parameters, direct, arguments) \
    ssize_t name parameters \
    { \
        NEXT(name); \
        struct iovec vectors[VECTORS]; \
        int what = at_fd(call, fd); \
        FAILS(what == FAIL, -1); \
        if (what == ZERO) return 0; \
        if (!what || count > VECTORS) return next direct; \
        cut(vectors, asked, count, what); \
        return next arguments; \
    }

VECTORED(preadv64v2, "preadv2", (int fd, const struct iovec *asked, int count, off64_t offset, int flags),
         (fd, asked, count, offset, flags), (fd, vectors, count, offset, flags))
VECTORED(pwritev64v2, "pwritev2", (int fd, const struct iovec *asked, int count, off64_t offset, int flags),
         (fd, asked, count, offset, flags), (fd, vectors, count, offset, flags))
VECTORED(readv, "readv", (int fd, const struct iovec *asked, int count), (fd, asked, count), (fd, vectors, count))
VECTORED(writev, "writev", (int fd, const struct iovec *asked, int count), (fd, asked, count), (fd, vectors, count))
