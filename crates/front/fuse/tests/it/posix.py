"""POSIX behaviour on a mounted directory: every check is an assertion, the first that fails ends the run."""
import ctypes, errno, fcntl, mmap, os, socket, stat, sys, time

root = sys.argv[1]
os.chdir(root)
libc = ctypes.CDLL(None, use_errno=True)


def fails(number, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except OSError as error:
        assert error.errno == number, f"{call} {args}: {error}, expected {errno.errorcode[number]}"
        return
    raise AssertionError(f"{call} {args} did not fail with {errno.errorcode[number]}")


def put(path, data):
    with open(path, "wb") as f:
        f.write(data)


def get(path):
    with open(path, "rb") as f:
        return f.read()


def renameat2(old, new, flags):
    if libc.renameat2(-100, old.encode(), -100, new.encode(), flags) != 0:
        raise OSError(ctypes.get_errno(), "renameat2")


# Names.
os.mkdir("d")
fails(errno.EEXIST, os.mkdir, "d")
fails(errno.ENOENT, os.stat, "absent")
fails(errno.ENAMETOOLONG, os.mkdir, "n" * 256)
os.mkdir("n" * 255)
os.rmdir("n" * 255)
put("d/f", b"content")
fails(errno.ENOTEMPTY, os.rmdir, "d")
fails(errno.ENOTDIR, os.rmdir, "d/f")
fails(errno.EISDIR, os.unlink, "d")
fails(errno.ENOTDIR, os.stat, "d/f/x")
fails(errno.EEXIST, os.open, "d/f", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
assert os.stat("d").st_nlink == 2
os.mkdir("d/sub")
assert os.stat("d").st_nlink == 3
os.rmdir("d/sub")
assert os.stat("d/..").st_ino == os.stat(".").st_ino
assert sorted(os.listdir("d")) == ["f"]

# Links.
os.link("d/f", "hard")
assert os.stat("hard").st_nlink == 2 and os.stat("hard").st_ino == os.stat("d/f").st_ino
os.unlink("d/f")
assert get("hard") == b"content" and os.stat("hard").st_nlink == 1
os.symlink("hard", "soft")
assert os.readlink("soft") == "hard" and get("soft") == b"content"
assert stat.S_ISLNK(os.lstat("soft").st_mode)
os.symlink("/nowhere/" + "x" * 4000, "long")
assert len(os.readlink("long")) == 4009
fails(errno.ENOENT, os.stat, "long")
fails(errno.EPERM, os.link, "d", "dirlink")

# Renames.
put("a", b"A")
put("b", b"B")
os.rename("a", "b")
assert get("b") == b"A" and not os.path.exists("a")
put("a", b"A2")
fails(errno.EEXIST, renameat2, "a", "b", 1)
renameat2("a", "b", 2)
assert get("a") == b"A" and get("b") == b"A2"
os.makedirs("t/u/v")
fails(errno.EINVAL, os.rename, "t", "t/u/v/w")
os.mkdir("full")
put("full/x", b"")
fails(errno.ENOTEMPTY, os.rename, "t", "full")
os.mkdir("empty")
os.rename("t", "empty")
assert os.path.isdir("empty/u/v")
fails(errno.ENOTDIR, os.rename, "empty", "a")
fails(errno.EISDIR, os.rename, "a", "empty")
os.rename("a", "a")

# Nodes.
os.mkfifo("fifo", 0o640)
assert stat.S_ISFIFO(os.stat("fifo").st_mode) and stat.S_IMODE(os.stat("fifo").st_mode) == 0o640
os.mknod("null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
assert os.stat("null").st_rdev == os.makedev(1, 3)
put("null", b"swallowed")
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind("socket")
    assert stat.S_ISSOCK(os.stat("socket").st_mode)

# Attributes.
old = os.umask(0o027)
put("masked", b"")
os.umask(old)
assert stat.S_IMODE(os.stat("masked").st_mode) == 0o640
os.chmod("masked", 0o4755)
assert stat.S_IMODE(os.stat("masked").st_mode) == 0o4755
os.chown("masked", 12, 34)
s = os.stat("masked")
assert (s.st_uid, s.st_gid) == (12, 34) and stat.S_IMODE(s.st_mode) == 0o755, oct(s.st_mode)
os.utime("masked", ns=(111_222_333_444, 555_666_777_888))
s = os.stat("masked")
assert (s.st_atime_ns, s.st_mtime_ns) == (111_222_333_444, 555_666_777_888)
with open("masked", "r+b") as f:
    f.write(b"x" * 10000)
    os.utime(f.fileno(), ns=(1, 2_000_000_000))
assert os.stat("masked").st_mtime_ns == 2_000_000_000 and os.stat("masked").st_size == 10000
before = time.time() - 2
put("masked", b"y")
assert os.stat("masked").st_mtime > before and os.stat("masked").st_size == 1
os.mkdir("shared")
os.chown("shared", 0, 77)
os.chmod("shared", 0o2775)
put("shared/f", b"")
os.mkdir("shared/d")
assert os.stat("shared/f").st_gid == 77
assert os.stat("shared/d").st_gid == 77 and os.stat("shared/d").st_mode & stat.S_ISGID

# Writers without privilege take set-user-id away; readers without permission stay out.
put("suid", b"#!")
os.chmod("suid", 0o4777)
put("secret", b"s")
os.chmod("secret", 0o600)
os.chmod(".", 0o755)
pid = os.fork()
if pid == 0:
    try:
        os.setgid(1234)
        os.setuid(1234)
        with open("suid", "r+b", buffering=0) as f:
            f.write(b"evil")
        fails(errno.EACCES, open, "secret")
        fails(errno.EACCES, open, "newfile", "w")
        fails(errno.EPERM, os.chmod, "secret", 0o777)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
assert os.waitpid(pid, 0)[1] == 0
assert stat.S_IMODE(os.stat("suid").st_mode) == 0o777, oct(os.stat("suid").st_mode)

# Content: sizes, holes, appends, positions.
with open("data", "w+b", buffering=0) as f:
    assert f.write(b"0123456789") == 10
    os.pwrite(f.fileno(), b"end", 1_000_000)
    assert os.fstat(f.fileno()).st_size == 1_000_003
    assert os.pread(f.fileno(), 20, 5) == b"56789" + bytes(15)
    assert os.pread(f.fileno(), 100, 1_000_000) == b"end"
    assert os.pread(f.fileno(), 100, 2_000_000) == b""
    os.fsync(f.fileno())
    f.truncate(5)
    f.truncate(20)
    assert os.pread(f.fileno(), 100, 0) == b"01234" + bytes(15)
with open("data", "ab", buffering=0) as one, open("data", "ab", buffering=0) as two:
    one.write(b"one")
    two.write(b"two")
    one.write(b"three")
assert get("data") == b"01234" + bytes(15) + b"onetwothree"
with open("data", "wb") as f:
    assert os.fstat(f.fileno()).st_size == 0
fails(errno.EBADF, lambda: os.write(os.open("data", os.O_RDONLY), b"x"))
fails(errno.EISDIR, os.open, "d", os.O_WRONLY)
os.truncate("data", 12345)
assert os.stat("data").st_size == 12345 and get("data") == bytes(12345)

# Unlinked while open, replaced while open.
f = open("gone", "w+b", buffering=0)
f.write(b"still here")
os.unlink("gone")
assert not os.path.exists("gone")
assert os.pread(f.fileno(), 100, 0) == b"still here"
os.pwrite(f.fileno(), b"STILL", 0)
os.ftruncate(f.fileno(), 8)
assert os.pread(f.fileno(), 100, 0) == b"STILL he" and os.fstat(f.fileno()).st_size == 8
assert os.fstat(f.fileno()).st_nlink == 0
f.close()
put("target", b"old")
put("source", b"new")
f = open("target", "rb")
os.rename("source", "target")
assert f.read() == b"old" and get("target") == b"new"
f.close()

# Extended attributes.
put("x", b"")
fails(errno.ENODATA, os.getxattr, "x", "user.a")
os.setxattr("x", "user.a", b"value")
os.setxattr("x", "user.empty", b"")
os.setxattr("x", "user.big", b"z" * 60000)
fails(errno.EEXIST, os.setxattr, "x", "user.a", b"w", os.XATTR_CREATE)
fails(errno.ENODATA, os.setxattr, "x", "user.b", b"w", os.XATTR_REPLACE)
assert os.getxattr("x", "user.a") == b"value" and os.getxattr("x", "user.empty") == b""
assert len(os.getxattr("x", "user.big")) == 60000
assert sorted(os.listxattr("x")) == ["user.a", "user.big", "user.empty"]
room = ctypes.create_string_buffer(2)
assert libc.getxattr(b"x", b"user.a", room, 2) == -1 and ctypes.get_errno() == errno.ERANGE
assert libc.getxattr(b"x", b"user.a", None, 0) == 5
os.removexattr("x", "user.a")
fails(errno.ENODATA, os.removexattr, "x", "user.a")
fails(errno.EOPNOTSUPP, os.setxattr, "x", "system.posix_acl_access", bytes(28))

# Holes.
with open("sparse", "w+b", buffering=0) as f:
    fd = f.fileno()
    os.posix_fallocate(fd, 0, 1 << 20)
    assert os.fstat(fd).st_size == 1 << 20
    os.pwrite(fd, b"d" * 65536, 262144)
    os.fsync(fd)
    assert os.lseek(fd, 0, os.SEEK_DATA) == 262144
    assert os.lseek(fd, 262144, os.SEEK_HOLE) == 262144 + 65536
    assert os.lseek(fd, 300000, os.SEEK_DATA) == 300000
    fails(errno.ENXIO, os.lseek, fd, 400000, os.SEEK_DATA)
    assert os.lseek(fd, 400000, os.SEEK_HOLE) == 400000
    fails(errno.ENXIO, os.lseek, fd, 1 << 20, os.SEEK_HOLE)

    def fallocate(mode, offset, length):
        if libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)) != 0:
            raise OSError(ctypes.get_errno(), "fallocate")

    fallocate(3, 262144, 4096)
    assert os.pread(fd, 4097, 262144) == bytes(4096) + b"d"
    assert os.lseek(fd, 0, os.SEEK_DATA) == 262144 + 4096
    fallocate(1, 1 << 20, 1 << 20)
    assert os.fstat(fd).st_size == 1 << 20
    fallocate(16, (1 << 20) - 4096, 8192)
    assert os.fstat(fd).st_size == (1 << 20) + 4096
    fails(errno.EOPNOTSUPP, fallocate, 8, 0, 4096)
    fails(errno.EOPNOTSUPP, fallocate, 32, 0, 4096)

# Copies inside the cluster.
blob = os.urandom(3_000_000)
put("from", blob)
with open("from", "rb") as source, open("to", "w+b") as target:
    done = 0
    while done < len(blob):
        count = os.copy_file_range(source.fileno(), target.fileno(), len(blob) - done)
        assert count > 0
        done += count
    assert os.copy_file_range(source.fileno(), target.fileno(), 10) == 0
assert get("to") == blob

# Memory maps.
with open("map", "w+b") as f:
    f.truncate(1 << 20)
    with mmap.mmap(f.fileno(), 1 << 20) as m:
        m[100:105] = b"hello"
        m[500_000:500_003] = b"mid"
        m.flush()
    assert os.pread(f.fileno(), 5, 100) == b"hello"
    os.pwrite(f.fileno(), b"jello", 100)
    with mmap.mmap(f.fileno(), 1 << 20, prot=mmap.PROT_READ) as m:
        assert m[100:105] == b"jello" and m[500_000:500_003] == b"mid"
assert get("map")[500_000:500_003] == b"mid"

# Locks are this host's.
with open("lock", "wb") as one, open("lock", "wb") as two:
    fcntl.flock(one, fcntl.LOCK_EX)
    fails(errno.EAGAIN, fcntl.flock, two, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(one, fcntl.LOCK_UN)
    fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.lockf(two, fcntl.LOCK_EX | fcntl.LOCK_NB)

# The file system itself.
v = os.statvfs(".")
assert v.f_namemax == 255 and v.f_bsize == 4096
d = os.open("d", os.O_RDONLY)
os.fsync(d)
os.rmdir("d")
# As on a local file system: it is still there for whoever has it open, and empty.
assert os.listdir(d) == [] and os.fstat(d).st_nlink == 0
fails(errno.ENOENT, os.mkdir, "x", dir_fd=d)
os.close(d)
os.sync()
