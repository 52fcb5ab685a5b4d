//! How the loader reaches physical memory.

use core::{mem::MaybeUninit, ptr, slice};

use x86_64::PhysAddr;

/// Physical memory, as far as [`crate::frames::Frames`] gave it out: the core passes no other
/// address to these methods.
pub trait Memory {
    /// Reads the page-table entry at `at`, which is 8-byte aligned and was written or zeroed before.
    fn read_entry(&self, at: PhysAddr) -> u64;
    /// Writes the page-table entry at `at`, which is 8-byte aligned.
    fn write_entry(&mut self, at: PhysAddr, entry: u64);
    /// Copies `bytes` to `at`.
    fn write(&mut self, at: PhysAddr, bytes: &[MaybeUninit<u8>]);
    /// Sets `len` bytes from `at` on to zero.
    fn zero(&mut self, at: PhysAddr, len: u64);
}

/// The memory of `values`, padding included: hence bytes that need not be initialised.
pub fn bytes_of<T>(values: &[T]) -> &[MaybeUninit<u8>] {
    // SAFETY: 1. The pointer and the length are those of a live slice, borrowed for as long as the
    // result. 2. `MaybeUninit<u8>` has alignment 1 and allows every byte, initialised or not.
    unsafe { slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// Physical memory that is mapped at its own addresses.
pub struct Identity {
    end: PhysAddr,
}

impl Identity {
    /// # Safety
    ///
    /// 1. Only addresses of memory that is there, and that nobody else uses, may be passed to the
    ///    methods: that given out by one `Frames` over the firmware's map. 2. It is mapped at its own
    ///    addresses up to `end`.
    pub unsafe fn new(end: PhysAddr) -> Self {
        Self { end }
    }

    /// The memory at `at`, as a pointer.
    pub fn pointer<T>(&self, at: PhysAddr) -> *mut T {
        assert!(at < self.end);
        ptr::with_exposed_provenance_mut(at.as_u64() as usize)
    }
}

impl Memory for Identity {
    fn read_entry(&self, at: PhysAddr) -> u64 {
        // SAFETY: exclusively ours, initialised and aligned, as the caller of `new` promised and
        // the trait demands.
        unsafe { self.pointer::<u64>(at).read() }
    }

    fn write_entry(&mut self, at: PhysAddr, entry: u64) {
        // SAFETY: as above.
        unsafe { self.pointer::<u64>(at).write(entry) }
    }

    fn write(&mut self, at: PhysAddr, bytes: &[MaybeUninit<u8>]) {
        // SAFETY: as above; what is written to is not what is read, since it is not in use.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.pointer(at), bytes.len()) }
    }

    fn zero(&mut self, at: PhysAddr, len: u64) {
        // SAFETY: as above.
        unsafe { self.pointer::<u8>(at).write_bytes(0, len as usize) }
    }
}

#[cfg(test)]
pub(crate) mod recording {
    //! A physical memory of any size that keeps only what was written, and who wrote entries.

    use std::collections::HashMap;

    use super::*;
    use crate::PAGE;

    /// Sparse memory. Touching a frame that was never zeroed or written in full is a test failure
    /// for entry accesses, as the loader must not trust what a frame held before.
    #[derive(Default)]
    pub struct Recording {
        frames: HashMap<u64, Box<[MaybeUninit<u8>; PAGE as usize]>>,
        /// Every entry write, in order.
        pub entries: Vec<(u64, u64)>,
    }

    impl Recording {
        fn frame(&mut self, at: u64) -> &mut [MaybeUninit<u8>; PAGE as usize] {
            self.frames
                .entry(at / PAGE)
                .or_insert_with(|| Box::new([MaybeUninit::new(0xa5); PAGE as usize]))
        }

        /// The `len` bytes at `at`; a frame never written is a failure.
        pub fn read(&self, at: u64, len: usize) -> Vec<MaybeUninit<u8>> {
            let byte = |a| {
                let frame = self.frames.get(&(a / PAGE));
                frame.unwrap_or_else(|| panic!("{a:#x} was never written"))[(a % PAGE) as usize]
            };
            (at..at + len as u64).map(byte).collect()
        }

        /// Like [`Self::read`], for memory that holds plain bytes.
        pub fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
            // SAFETY: callers read only what was written from `u8` or zeroed, and frames start out
            // filled with 0xa5.
            self.read(at, len).into_iter().map(|b| unsafe { b.assume_init() }).collect()
        }

        fn entry(&self, at: PhysAddr) -> *const u64 {
            assert!(at.is_aligned(8u64));
            let frame = self.frames.get(&(at.as_u64() / PAGE));
            let frame = frame.unwrap_or_else(|| panic!("table {at:?} was never cleared"));
            frame[(at.as_u64() % PAGE) as usize..][..8].as_ptr().cast()
        }
    }

    impl Memory for Recording {
        fn read_entry(&self, at: PhysAddr) -> u64 {
            // SAFETY: eight bytes in a live frame, and tables hold plain bytes.
            unsafe { self.entry(at).read_unaligned() }
        }

        fn write_entry(&mut self, at: PhysAddr, entry: u64) {
            self.entry(at);
            self.entries.push((at.as_u64(), entry));
            self.frame(at.as_u64())[(at.as_u64() % PAGE) as usize..][..8]
                .copy_from_slice(bytes_of(&entry.to_le_bytes()));
        }

        fn write(&mut self, at: PhysAddr, bytes: &[MaybeUninit<u8>]) {
            let (mut at, mut bytes) = (at.as_u64(), bytes);
            while !bytes.is_empty() {
                let offset = (at % PAGE) as usize;
                let (now, later) = bytes.split_at(bytes.len().min(PAGE as usize - offset));
                self.frame(at)[offset..][..now.len()].copy_from_slice(now);
                at += now.len() as u64;
                bytes = later;
            }
        }

        fn zero(&mut self, at: PhysAddr, len: u64) {
            self.write(at, bytes_of(&vec![0u8; len as usize]));
        }
    }
}
