//! Random operations on a file of the mount against a shadow on the local disk, as fsx does.

use crate::needs_fuse;
use cairn_stdx::Rng;
use cairn_tests::cluster::Cluster;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

/// Largest size the file gets: a chunk and a bit, so that operations cross its end.
const SIZE_MAX: u64 = (64 << 20) + (1 << 20);
/// Longest single read or write.
const LENGTH_MAX: u64 = 256 << 10;

struct Pair {
    real: File,
    shadow: File,
    log: Vec<String>,
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

fn exercise(seed: u64, steps: u64) {
    let cluster = Cluster::start(Duration::from_secs(90 + steps / 10));
    let (real_path, shadow_path) = (cluster.mount().join("fsx"), cluster.beside("shadow"));
    let holes = takes_holes(&cluster.mount());
    eprintln!("holes are punched: {holes}");
    let mut rng = Rng::new(seed);
    let mut pair = Pair { real: open(&real_path), shadow: open(&shadow_path), log: Vec::new() };
    for step in 0..steps {
        let (offset, length) = (place(&mut rng), rng.range(1, LENGTH_MAX));
        match rng.below(20) {
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
                pair.real = open(&real_path);
            }
            _ => {
                let size = pair.shadow.metadata().expect("stat").len();
                let bytes = [step as u8; 1000];
                if size < SIZE_MAX {
                    pair.both(format!("append at {size}"), |file| file.write_all_at(&bytes, size));
                }
            }
        }
    }
    pair.real = open(&real_path);
    for part in 0..=SIZE_MAX >> 20 {
        pair.compare(part << 20, 1 << 20);
    }
}

#[test]
fn random_operations_leave_the_file_as_its_shadow() {
    needs_fuse!();
    exercise(42, 3000);
}

#[test]
#[ignore = "long: ten minutes"]
fn random_operations_leave_the_file_as_its_shadow_for_long() {
    needs_fuse!();
    exercise(43, 60_000);
}
