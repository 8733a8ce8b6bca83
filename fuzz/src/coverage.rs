//! Coverage from LLVM's instrumentation: 8-bit counters on edges, operands of comparisons.
//!
//! The compiler of the stable toolchain can instrument (`-C passes=sancov-module`); what libFuzzer would provide are a
//! few callbacks, and those are here, so that no C++ is needed. Without the feature `coverage` all of this is empty.

#![cfg_attr(
    feature = "coverage",
    expect(unsafe_code, reason = "counters that the compiler placed are read and cleared through raw pointers")
)]

/// Pairs of operands kept between two looks.
#[cfg(feature = "coverage")]
const COMPARES: usize = 256;

/// What has been seen so far, by bucket of each counter.
#[derive(Default)]
pub struct Seen {
    #[cfg(feature = "coverage")]
    buckets: Vec<u8>,
    /// Edges seen at least once.
    pub edges: usize,
}

#[cfg(feature = "coverage")]
mod callbacks {
    use super::COMPARES;
    use std::cell::UnsafeCell;
    use std::sync::Mutex;

    pub static REGIONS: Mutex<Vec<(usize, usize)>> = Mutex::new(Vec::new());

    pub struct Ring(pub UnsafeCell<[(u64, u64); COMPARES]>, pub UnsafeCell<usize>);
    // SAFETY: a torn pair of another thread is only a useless hint.
    unsafe impl Sync for Ring {}
    pub static RING: Ring = Ring(UnsafeCell::new([(0, 0); COMPARES]), UnsafeCell::new(0));

    /// # Safety
    /// Called by the instrumentation with the bounds of a module's counters.
    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn __sanitizer_cov_8bit_counters_init(start: *mut u8, stop: *mut u8) {
        if let Ok(mut regions) = REGIONS.lock() {
            regions.push((start as usize, stop as usize));
        }
    }

    macro_rules! compare {
        ($($name:ident: $type:ty),*) => {$(
            /// Called by the instrumentation at a comparison.
            #[unsafe(no_mangle)]
            pub extern "C" fn $name(left: $type, right: $type) {
                // SAFETY: the index stays within the ring; a race only spoils a hint.
                unsafe {
                    let at = RING.1.get();
                    let index = *at & (COMPARES - 1);
                    *at = index.wrapping_add(1);
                    *(RING.0.get() as *mut (u64, u64)).wrapping_add(index) = (left as u64, right as u64);
                }
            }
        )*};
    }
    compare! {
        __sanitizer_cov_trace_cmp2: u16, __sanitizer_cov_trace_cmp4: u32, __sanitizer_cov_trace_cmp8: u64,
        __sanitizer_cov_trace_const_cmp2: u16, __sanitizer_cov_trace_const_cmp4: u32,
        __sanitizer_cov_trace_const_cmp8: u64
    }

    /// Single bytes are found by chance.
    #[unsafe(no_mangle)]
    pub extern "C" fn __sanitizer_cov_trace_cmp1(_: u8, _: u8) {}
    /// Single bytes are found by chance.
    #[unsafe(no_mangle)]
    pub extern "C" fn __sanitizer_cov_trace_const_cmp1(_: u8, _: u8) {}
    /// The edges of a switch are counted anyway.
    #[unsafe(no_mangle)]
    pub extern "C" fn __sanitizer_cov_trace_switch(_: u64, _: *const u64) {}
}

/// The class of a count: one more execution of a loop is nothing new, twice as many is.
#[cfg(feature = "coverage")]
fn bucket(count: u8) -> u8 {
    match count {
        0 => 0,
        1 => 1,
        2 => 2,
        3 => 4,
        4..=7 => 8,
        8..=15 => 16,
        16..=31 => 32,
        32..=127 => 64,
        128.. => 128,
    }
}

impl Seen {
    /// True when this build is instrumented.
    pub fn guided() -> bool {
        cfg!(feature = "coverage")
    }

    /// Forgets what was counted before an execution.
    pub fn clear(&mut self) {
        #[cfg(feature = "coverage")]
        for (start, stop) in callbacks::REGIONS.lock().expect("no callback panics").iter().copied() {
            // SAFETY: the region is the counters of a module, which live as long as the process.
            unsafe { std::ptr::write_bytes(start as *mut u8, 0, stop - start) };
        }
    }

    /// Takes in what the execution reached; true when some of it is new.
    pub fn look(&mut self) -> bool {
        #[cfg(feature = "coverage")]
        {
            let regions = callbacks::REGIONS.lock().expect("no callback panics");
            let total: usize = regions.iter().map(|(start, stop)| stop - start).sum();
            self.buckets.resize(total, 0);
            let (mut at, mut new) = (0, false);
            for (start, stop) in regions.iter().copied() {
                // SAFETY: as above; nothing else runs on this thread meanwhile.
                let counters = unsafe { std::slice::from_raw_parts(start as *const u8, stop - start) };
                for chunk in counters.chunks(64) {
                    if chunk.iter().any(|count| *count != 0) {
                        for (i, count) in chunk.iter().enumerate().filter(|(_, count)| **count != 0) {
                            let (bit, seen) = (bucket(*count), &mut self.buckets[at + i]);
                            if *seen & bit == 0 {
                                self.edges += usize::from(*seen == 0);
                                *seen |= bit;
                                new = true;
                            }
                        }
                    }
                    at += chunk.len();
                }
            }
            return new;
        }
        #[cfg(not(feature = "coverage"))]
        false
    }
}

/// Operands that were compared lately and differed: one of them may be what the other should have been.
pub fn compared() -> Vec<(u64, u64)> {
    #[cfg(feature = "coverage")]
    {
        // SAFETY: a copy of plain numbers.
        let ring = unsafe { *callbacks::RING.0.get() };
        return ring.into_iter().filter(|(left, right)| left != right).collect();
    }
    #[cfg(not(feature = "coverage"))]
    Vec::new()
}
