//! Random operations on a file of the mount against a shadow on the local disk, as fsx does: reads, writes, appends,
//! truncation, holes, mapped memory, fsync, renames, and files that lose their name while they are open.
//!
//! `CAIRN_FSX_SECONDS` says how long (half a minute unless set), `CAIRN_FSX_SEED` what is drawn.

use crate::needs_fuse;
use cairn_stdx::Rng;
use cairn_tests::cluster::Cluster;
use cairn_tests::process;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Largest size the file gets: a chunk and a bit, so that operations cross its end.
const SIZE_MAX: u64 = (64 << 20) + (1 << 20);
/// Longest single read or write.
const LENGTH_MAX: u64 = 256 << 10;

struct Pair {
    real: File,
    shadow: File,
    log: Vec<String>,
    /// Where the file of the mount is.
    path: PathBuf,
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).create(true).truncate(false).open(path).expect("open a file")
}

/// Places cluster around the end of a chunk, the start, and one random spot; there most mistakes are made.
fn place(rng: &mut Rng) -> u64 {
    let base = match rng.below(4) {
        0 => 0,
        1 => (64 << 20) - LENGTH_MAX,
        2 => 1 << 20,
        _ => rng.below(SIZE_MAX - LENGTH_MAX),
    };
    let offset = base + rng.below(LENGTH_MAX);
    if rng.chance(1, 3) { offset & !4095 } else { offset }
}

impl Pair {
    fn both(&mut self, what: String, mut act: impl FnMut(&File) -> std::io::Result<()>) {
        self.log.push(what);
        let shadow = act(&self.shadow);
        let real = act(&self.real);
        if let (Ok(()), Err(error)) = (&shadow, &real) {
            self.fail(&format!("the mount refused it: {error}"));
        }
        shadow.expect("the shadow file takes everything");
    }

    fn fail(&self, why: &str) -> ! {
        let from = self.log.len().saturating_sub(20);
        panic!("{why}; last operations:\n{}", self.log[from..].join("\n"));
    }

    /// Changes a mapped range of both files and compares what the mapping shows before and after.
    fn map(&mut self, rng: &mut Rng, offset: u64, length: u64) {
        let size = self.shadow.metadata().expect("stat").len();
        let offset = offset & !4095;
        let length = length.min(size.saturating_sub(offset)) as usize;
        if length == 0 {
            return;
        }
        self.log.push(format!("map {offset}+{length}"));
        let mapping = Mapping::new(&self.real, offset, length);
        let mut mapping = mapping.unwrap_or_else(|error| self.fail(&format!("mapping failed: {error}")));
        let mut expected = vec![0; length];
        self.shadow.read_exact_at(&mut expected, offset).expect("read the shadow");
        let at = rng.below(length as u64) as usize;
        let end = (at + 1 + rng.below(20_000) as usize).min(length);
        let byte = rng.below(256) as u8;
        let same = mapping.bytes() == expected;
        expected[at..end].fill(byte);
        mapping.bytes()[at..end].fill(byte);
        if !same || mapping.bytes() != expected {
            self.fail("the mapped memory is not the file");
        }
        self.shadow.write_all_at(&expected[at..end], offset + at as u64).expect("write the shadow");
        if rng.chance(1, 2)
            && let Err(error) = mapping.sync()
        {
            self.fail(&format!("msync failed: {error}"));
        }
    }

    /// Gives the file another name, sometimes one that is taken, under which it is found from then on.
    fn rename(&mut self, rng: &mut Rng) {
        let to = self.path.with_file_name(format!("fsx-{}", rng.below(3)));
        self.log.push(format!("rename to {}", to.display()));
        if to != self.path && rng.chance(1, 3) {
            std::fs::write(&to, "in the way").expect("write a file");
        }
        std::fs::rename(&self.path, &to).unwrap_or_else(|error| self.fail(&format!("rename failed: {error}")));
        self.path = to;
    }

    /// The file loses its name and is used on; then both files begin anew.
    fn unlink(&mut self) {
        self.log.push("unlink while open".to_owned());
        std::fs::remove_file(&self.path).unwrap_or_else(|error| self.fail(&format!("unlink failed: {error}")));
        self.both("write to the file without a name".to_owned(), |file| file.write_all_at(&[7; 5000], 10_000));
        self.both("fsync".to_owned(), File::sync_all);
        self.compare(0, 1 << 20);
        self.compare((64 << 20) - 4096, 8192);
        self.both("truncate 0".to_owned(), |file| file.set_len(0));
        self.real = open(&self.path);
        self.compare(0, 4096);
    }

    fn compare(&mut self, offset: u64, length: u64) {
        self.log.push(format!("read {offset}+{length}"));
        let sizes = [&self.real, &self.shadow].map(|file| file.metadata().expect("stat").len());
        if sizes[0] != sizes[1] {
            self.fail(&format!("the size is {}, not {}", sizes[0], sizes[1]));
        }
        let length = length.min(sizes[0].saturating_sub(offset)) as usize;
        let (mut real, mut shadow) = (vec![0; length], vec![0; length]);
        self.shadow.read_exact_at(&mut shadow, offset).expect("read the shadow");
        if let Err(error) = self.real.read_exact_at(&mut real, offset) {
            self.fail(&format!("reading failed: {error}"));
        }
        if let Some(at) = (0..length).find(|at| real[*at] != shadow[*at]) {
            let wrong = (at..length).take_while(|at| real[*at] != shadow[*at]).count();
            self.fail(&format!("{wrong} wrong bytes from {}: {} for {}", offset + at as u64, real[at], shadow[at]));
        }
    }
}

/// A range of a file mapped into memory and shared with it; unmapped when dropped.
struct Mapping {
    start: *mut libc::c_void,
    length: usize,
}

impl Mapping {
    /// `offset` is a multiple of the page size and the range lies within the file.
    #[expect(unsafe_code, reason = "mmap(2)")]
    fn new(file: &File, offset: u64, length: usize) -> std::io::Result<Self> {
        let (rights, fd) = (libc::PROT_READ | libc::PROT_WRITE, file.as_raw_fd());
        // SAFETY: a fresh mapping at an address of the kernel's choice; the descriptor is open.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), length, rights, libc::MAP_SHARED, fd, offset as i64) };
        if start == libc::MAP_FAILED { Err(std::io::Error::last_os_error()) } else { Ok(Self { start, length }) }
    }

    #[expect(unsafe_code, reason = "memory shared with a file")]
    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the range is mapped for reading and writing; this test alone shortens the file, never meanwhile.
        unsafe { std::slice::from_raw_parts_mut(self.start.cast(), self.length) }
    }

    #[expect(unsafe_code, reason = "msync(2)")]
    fn sync(&self) -> std::io::Result<()> {
        // SAFETY: the range is mapped.
        match unsafe { libc::msync(self.start, self.length, libc::MS_SYNC) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }
}

impl Drop for Mapping {
    #[expect(unsafe_code, reason = "munmap(2)")]
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nothing refers to it any more.
        unsafe { libc::munmap(self.start, self.length) };
    }
}

#[expect(unsafe_code, reason = "fallocate(2)")]
fn fallocate(file: &File, mode: libc::c_int, offset: u64, length: u64) -> std::io::Result<()> {
    // SAFETY: plain system call on an open descriptor.
    match unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as i64, length as i64) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// True when the mount offers holes; a file system may say that it does not.
fn takes_holes(dir: &Path) -> bool {
    let file = open(&dir.join("probe"));
    file.set_len(1 << 20).expect("set its length");
    let outcome = fallocate(&file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, 4096, 4096);
    outcome.is_ok() || outcome.is_err_and(|error| error.raw_os_error() != Some(libc::EOPNOTSUPP))
}

fn exercise(seed: u64, limit: Duration) {
    let cluster = Cluster::start(Duration::from_secs(150) + limit);
    let (path, shadow_path) = (cluster.mount().join("fsx-0"), cluster.beside("shadow"));
    let holes = takes_holes(&cluster.mount());
    let mut rng = Rng::new(seed);
    let mut pair = Pair { real: open(&path), shadow: open(&shadow_path), log: Vec::new(), path };
    let begun = process::now();
    let mut step = 0u64;
    while begun.elapsed() < limit {
        step += 1;
        // For a message only; a run of hours must not keep all of it.
        if pair.log.len() > 1000 {
            pair.log.drain(..500);
        }
        let (offset, length) = (place(&mut rng), rng.range(1, LENGTH_MAX));
        match rng.below(24) {
            0..=6 => {
                let mut bytes = vec![0; length as usize];
                bytes.chunks_mut(8).for_each(|part| {
                    let word = rng.next_u64().to_le_bytes();
                    part.copy_from_slice(&word[..part.len()]);
                });
                pair.both(format!("write {offset}+{length}"), |file| file.write_all_at(&bytes, offset));
            }
            7..=12 => pair.compare(offset, length),
            13 | 14 => pair.both(format!("truncate {offset}"), |file| file.set_len(offset)),
            15 | 16 if holes => pair.both(format!("punch {offset}+{length}"), |file| {
                fallocate(file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, length)
            }),
            17 => pair.both("fsync".to_owned(), File::sync_all),
            18 => {
                pair.log.push("reopen".to_owned());
                pair.real = open(&pair.path);
            }
            20 | 21 => pair.map(&mut rng, offset, length),
            22 => pair.rename(&mut rng),
            23 if rng.chance(1, 20) => pair.unlink(),
            _ => {
                let size = pair.shadow.metadata().expect("stat").len();
                let bytes = [step as u8; 1000];
                if size < SIZE_MAX {
                    pair.both(format!("append at {size}"), |file| file.write_all_at(&bytes, size));
                }
            }
        }
    }
    pair.real = open(&pair.path);
    for part in 0..=SIZE_MAX >> 20 {
        pair.compare(part << 20, 1 << 20);
    }
    eprintln!("{step} operations in {:.0} s, seed {seed}, holes punched: {holes}", begun.elapsed().as_secs_f64());
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is a number")))
}

#[test]
fn random_operations_leave_the_file_as_its_shadow() {
    needs_fuse!();
    exercise(setting("CAIRN_FSX_SEED", 42), Duration::from_secs(setting("CAIRN_FSX_SECONDS", 30)));
}
