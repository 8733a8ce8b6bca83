//! An allocator that counts, so that a target's memory can be held against its bound.
//!
//! Counted per thread: what threads of a target do on their own is theirs. [`measured`] puts a section on the scales;
//! what it keeps counts as well as what it gives back, because the bound is on the peak.

#![expect(unsafe_code, reason = "a global allocator is unsafe by its trait; it only counts and passes on")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// A single allocation as large as this would be the end of a real process; here it ends the run with the input saved.
const SINGLE_MAX: usize = 1 << 30;

/// The counting allocator; the binary and the tests install it.
pub struct Counting;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
    static WORST: Cell<Excess> = const { Cell::new(Excess { peak: 0, input: 0, over: 0, largest: 0 }) };
    static BOUND: Cell<(usize, usize)> = const { Cell::new((usize::MAX, 0)) };
}

/// What the sections of one execution cost.
#[derive(Clone, Copy, Debug, Default)]
pub struct Excess {
    /// Bytes at the peak of the section that came nearest to its bound, or went furthest beyond.
    pub peak: usize,
    /// Bytes of input of that section.
    pub input: usize,
    /// Bytes beyond the bound.
    pub over: usize,
    /// Highest peak of any section.
    pub largest: usize,
}

fn count(bytes: isize) {
    let live = LIVE.get().wrapping_add(bytes);
    LIVE.set(live);
    if live > PEAK.get() {
        PEAK.set(live);
    }
}

// SAFETY: every call is passed on to the system's allocator with the same arguments.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        look(layout.size());
        count(layout.size() as isize);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        look(layout.size());
        count(layout.size() as isize);
        // SAFETY: as the caller promised.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        look(size);
        count(size as isize - layout.size() as isize);
        // SAFETY: as the caller promised.
        unsafe { System.realloc(at, layout, size) }
    }
}

fn look(size: usize) {
    if size >= SINGLE_MAX {
        crate::engine::give_up(&format!("an allocation of {size} bytes"));
    }
}

/// Sets the bound for the sections to come and forgets those before.
pub fn begin(base: usize, factor: usize) {
    BOUND.set((base, factor));
    WORST.set(Excess::default());
}

/// What the sections since [`begin`] cost.
pub fn worst() -> Excess {
    WORST.get()
}

/// Runs `read` over `input` bytes of input and notes the most memory it held at any moment.
pub fn measured<T>(input: usize, read: impl FnOnce() -> T) -> T {
    let before = LIVE.get();
    PEAK.set(before);
    let value = read();
    let peak = PEAK.get().wrapping_sub(before).max(0) as usize;
    let (base, factor) = BOUND.get();
    let over = peak.saturating_sub(base.max(factor.saturating_mul(input)));
    let worst = WORST.get();
    let largest = worst.largest.max(peak);
    let nearer = over > worst.over || (over == worst.over && peak >= worst.peak);
    WORST.set(if nearer { Excess { peak, input, over, largest } } else { Excess { largest, ..worst } });
    value
}
