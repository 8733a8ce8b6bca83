//! Random operations on one file against a copy in memory, through cached and direct handles and after remounts.

use crate::TestMount;
use crate::world::Cluster;
use cairn_stdx::Rng;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

const SIZE_MAX: u64 = 1 << 20;

fn fallocate(file: &File, mode: i32, offset: u64, len: u64) -> std::io::Result<()> {
    // SAFETY: plain numbers and an open descriptor.
    #[expect(unsafe_code, reason = "the standard library has no fallocate")]
    let result = unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as i64, len as i64) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

struct Fsx {
    rng: Rng,
    shadow: Vec<u8>,
}

impl Fsx {
    fn range(&mut self) -> (u64, u64) {
        let offset = self.rng.below(SIZE_MAX);
        let most = [10, 5000, 200_000][self.rng.below(3) as usize];
        (offset, (1 + self.rng.below(most)).min(SIZE_MAX - offset))
    }

    fn put(&mut self, offset: u64, data: &[u8]) {
        let end = offset as usize + data.len();
        if self.shadow.len() < end {
            self.shadow.resize(end, 0);
        }
        self.shadow[offset as usize..end].copy_from_slice(data);
    }

    fn step(&mut self, file: &File, append: &File) {
        let (offset, len) = self.range();
        match self.rng.below(12) {
            0..=3 => {
                let mut data = vec![0; len as usize];
                self.rng.fill(&mut data);
                file.write_all_at(&data, offset).expect("write");
                self.put(offset, &data);
            }
            4 if self.shadow.len() < SIZE_MAX as usize => {
                use std::io::Write;
                let mut data = vec![0; len.min(9000) as usize];
                self.rng.fill(&mut data);
                let mut append = append;
                append.write_all(&data).expect("append");
                self.put(self.shadow.len() as u64, &data);
            }
            5 => {
                file.set_len(offset).expect("truncate");
                self.shadow.resize(offset as usize, 0);
            }
            6 => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                fallocate(file, mode, offset, len).expect("punch");
                let end = (offset + len).min(self.shadow.len() as u64);
                if offset < end {
                    self.shadow[offset as usize..end as usize].fill(0);
                }
            }
            7 => {
                fallocate(file, libc::FALLOC_FL_ZERO_RANGE, offset, len).expect("zero");
                self.put(offset, &vec![0; len as usize]);
            }
            8 => {
                fallocate(file, 0, offset, len).expect("allocate");
                let end = (offset + len) as usize;
                if self.shadow.len() < end {
                    self.shadow.resize(end, 0);
                }
            }
            9 => file.sync_all().expect("sync"),
            _ => self.compare(file, offset, len),
        }
        assert_eq!(file.metadata().expect("stat").len(), self.shadow.len() as u64);
    }

    fn compare(&self, file: &File, offset: u64, len: u64) {
        let mut found = vec![0; len as usize];
        let mut filled = 0;
        while filled < found.len() {
            match file.read_at(&mut found[filled..], offset + filled as u64).expect("read") {
                0 => break,
                count => filled += count,
            }
        }
        let from = (offset as usize).min(self.shadow.len());
        let expected = &self.shadow[from..(offset as usize + len as usize).min(self.shadow.len()).max(from)];
        assert_eq!(filled, expected.len(), "length of a read at {offset}+{len}");
        if let Some(at) = (0..filled).find(|&at| found[at] != expected[at]) {
            panic!("byte {} differs: {:#x} for {:#x}", offset as usize + at, found[at], expected[at]);
        }
    }

    fn all(&self, path: &Path) {
        let file = File::open(path).expect("open");
        self.compare(&file, 0, SIZE_MAX + 10_000_000);
    }
}

fn run(seed: u64, options: &str, flags: i32, steps: u32) {
    let cluster = Cluster::start(seed);
    run_on(seed, || TestMount::new(&cluster, options), flags, steps);
}

/// Runs `steps` random operations, remounting twice.
pub fn run_on(seed: u64, new_mount: impl Fn() -> Option<TestMount>, flags: i32, steps: u32) {
    let Some(mut mount) = new_mount() else { return };
    let mut fsx = Fsx { rng: Rng::new(seed), shadow: Vec::new() };
    for round in 0..3 {
        let path = mount.path().join(format!("file {seed}"));
        let open = |append| {
            OpenOptions::new().read(true).write(true).create(true).append(append).custom_flags(flags).open(&path)
        };
        let (file, append) = (open(false).expect("open"), open(true).expect("open to append"));
        for _ in 0..steps / 3 {
            fsx.step(&file, &append);
        }
        drop((file, append));
        fsx.all(&path);
        if round < 2 {
            mount.unmount();
            mount = new_mount().expect("mounts again");
        }
    }
}

#[test]
fn random_operations_match_a_copy_in_memory() {
    run(1, "", 0, 1500);
    run(2, "threads=1", 0, 1500);
}

#[test]
fn random_operations_match_with_writes_kept_by_the_kernel() {
    run(3, "writeback", 0, 1500);
}

#[test]
fn random_operations_match_through_direct_handles() {
    run(4, "", libc::O_DIRECT, 900);
}

#[test]
fn random_operations_match_through_synchronous_handles() {
    run(5, "", libc::O_DSYNC, 600);
}
