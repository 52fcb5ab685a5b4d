//! Physical frames: one bit each, set when free.

use vmx::addr::HostPhysAddr;

/// Size of a frame in bytes.
pub const FRAME: u64 = 4096;
/// Size of a large frame in bytes, and its alignment.
pub const LARGE_FRAME: u64 = 2 << 20;
/// Words of the bitmap that make up a large frame: 512 frames.
const LARGE_WORDS: usize = (LARGE_FRAME / FRAME / 64) as usize;

/// A bitmap allocator for 4-KiB and 2-MiB frames.
///
/// Frames come back when a VM ends, so that VMs can come and go for ever; a search is bounded by
/// the size of the bitmap, 32 KiB for each GiB.
pub struct FrameAllocator<'a> {
    /// Bit n of the bitmap: the frame at n * 4096 is free.
    bitmap: &'a mut [u64],
    /// No word below this one has a free frame.
    first: usize,
    free: u64,
}

impl<'a> FrameAllocator<'a> {
    /// Words needed to describe memory that ends at `top` bytes.
    pub const fn words(top: u64) -> usize {
        (top.div_ceil(FRAME * 64)) as usize
    }

    /// An allocator without any free frame.
    pub fn new(bitmap: &'a mut [u64]) -> Self {
        bitmap.fill(0);
        let first = bitmap.len();
        Self { bitmap, first, free: 0 }
    }

    /// Makes all whole frames between `start` and `end` (bytes) free. What lies above the bitmap
    /// is left out.
    pub fn add(&mut self, start: u64, end: u64) {
        let last = (end / FRAME).min(self.bitmap.len() as u64 * 64);
        for frame in start.div_ceil(FRAME)..last {
            self.set_free(frame as usize);
        }
    }

    /// Free memory in bytes.
    pub fn free_bytes(&self) -> u64 {
        self.free * FRAME
    }

    fn set_free(&mut self, frame: usize) {
        let (word, bit) = (frame / 64, 1 << (frame % 64));
        if self.bitmap[word] & bit == 0 {
            self.bitmap[word] |= bit;
            self.free += 1;
            self.first = self.first.min(word);
        }
    }

    /// A frame; its contents are whatever they were.
    pub fn allocate(&mut self) -> Option<HostPhysAddr> {
        let offset = self.bitmap.get(self.first..)?.iter().position(|word| *word != 0)?;
        self.first += offset;
        let bit = self.bitmap[self.first].trailing_zeros();
        self.bitmap[self.first] &= !(1 << bit);
        self.free -= 1;
        HostPhysAddr::new((self.first as u64 * 64 + u64::from(bit)) * FRAME)
    }

    /// A large frame, from the top of memory downwards, so that small ones do not break it up.
    pub fn allocate_large(&mut self) -> Option<HostPhysAddr> {
        let index = self
            .bitmap
            .chunks_exact(LARGE_WORDS)
            .rposition(|words| words.iter().all(|word| *word == u64::MAX))?;
        self.bitmap[index * LARGE_WORDS..][..LARGE_WORDS].fill(0);
        self.free -= LARGE_WORDS as u64 * 64;
        HostPhysAddr::new(index as u64 * LARGE_FRAME)
    }

    /// Takes a frame back.
    ///
    /// # Panics
    ///
    /// When the frame is free already: our own error, which would hand it out twice.
    pub fn free(&mut self, frame: HostPhysAddr) {
        let index = (frame.as_u64() / FRAME) as usize;
        assert!(self.bitmap[index / 64] & 1 << (index % 64) == 0, "freed twice: {frame:?}");
        self.set_free(index);
    }

    /// Takes a large frame back.
    pub fn free_large(&mut self, frame: HostPhysAddr) {
        for offset in (0..LARGE_FRAME).step_by(FRAME as usize) {
            self.free(HostPhysAddr::new_truncate(frame.as_u64() + offset));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_frame_is_given_out_once_and_comes_back() {
        let mut bitmap = [0; FrameAllocator::words(8 << 20)];
        let mut frames = FrameAllocator::new(&mut bitmap);
        frames.add(0x1234, 0x9000);
        frames.add(2 << 20, 6 << 20);
        let total = frames.free_bytes();
        assert_eq!(total, 7 * FRAME + (4 << 20));
        let large = frames.allocate_large().unwrap();
        assert_eq!(large.as_u64(), 4 << 20);
        let small: BTreeSet<_> = core::iter::from_fn(|| frames.allocate()).collect();
        assert_eq!(small.len() as u64, 7 + 512);
        assert!(small.iter().all(|frame| frame.as_u64() >= 0x2000 && *frame < large));
        assert_eq!((frames.free_bytes(), frames.allocate_large()), (0, None));
        small.into_iter().for_each(|frame| frames.free(frame));
        frames.free_large(large);
        assert_eq!(frames.free_bytes(), total);
        assert_eq!(frames.allocate().unwrap().as_u64(), 0x2000);
    }

    #[test]
    #[should_panic(expected = "freed twice")]
    fn freeing_twice_is_an_error() {
        let mut bitmap = [0; FrameAllocator::words(1 << 20)];
        let mut frames = FrameAllocator::new(&mut bitmap);
        frames.add(0, 1 << 20);
        let frame = frames.allocate().unwrap();
        frames.free(frame);
        frames.free(frame);
    }

    #[test]
    fn memory_above_the_bitmap_is_left_out() {
        let mut bitmap = [0; FrameAllocator::words(1 << 20)];
        let mut frames = FrameAllocator::new(&mut bitmap);
        frames.add(0, u64::MAX);
        assert_eq!(frames.free_bytes(), 1 << 20);
    }
}
