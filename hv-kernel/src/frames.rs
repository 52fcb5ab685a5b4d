//! Physical frames: one bit each, set when free.

use arrayvec::ArrayVec;
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
    /// No large frame at or above this one is free.
    large_end: usize,
    free: u64,
    /// Frames with memory errors, which are never given out again.
    condemned: ArrayVec<usize, 64>,
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
        Self { bitmap, first, large_end: 0, free: 0, condemned: ArrayVec::new() }
    }

    /// Makes all whole frames between `start` and `end` (bytes) free. What lies above the bitmap
    /// is left out. A word at a time: there may be TiBs.
    pub fn add(&mut self, start: u64, end: u64) {
        let mut frame = start.div_ceil(FRAME) as usize;
        let end = (end / FRAME).min(self.bitmap.len() as u64 * 64) as usize;
        while frame < end {
            let next = (frame / 64 * 64 + 64).min(end);
            self.set_free(frame / 64, (u64::MAX >> (64 - (next - frame))) << (frame % 64));
            frame = next;
        }
    }

    /// This frame is not given out again, whether it is free or will be. False if so many are
    /// condemned that no more can be remembered.
    pub fn condemn(&mut self, frame: HostPhysAddr) -> bool {
        let index = (frame.as_u64() / FRAME) as usize;
        if let Some(word) = self.bitmap.get_mut(index / 64)
            && *word & 1 << (index % 64) != 0
        {
            *word &= !(1 << (index % 64));
            self.free -= 1;
        }
        self.condemned.contains(&index) || self.condemned.try_push(index).is_ok()
    }

    /// Free memory in bytes.
    pub fn free_bytes(&self) -> u64 {
        self.free * FRAME
    }

    fn set_free(&mut self, word: usize, bits: u64) {
        let mut new = bits & !self.bitmap[word];
        for frame in self.condemned.iter().filter(|frame| **frame / 64 == word) {
            new &= !(1 << (frame % 64));
        }
        self.bitmap[word] |= new;
        self.free += u64::from(new.count_ones());
        self.first = self.first.min(word);
        self.large_end = self.large_end.max(word / LARGE_WORDS + 1);
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
        let end = self.large_end.min(self.bitmap.len() / LARGE_WORDS);
        let index = (0..end).rev().find(|index| self.is_large(*index));
        // What was found to be taken is not looked at again until something there is freed.
        self.large_end = index.unwrap_or(0);
        self.take_large(index?, 1)
    }

    /// So many large frames in a row, as high as there are: the first one.
    pub fn allocate_run(&mut self, count: usize) -> Option<HostPhysAddr> {
        let mut run = 0;
        let first = (0..self.bitmap.len() / LARGE_WORDS).rev().find(|index| {
            run = if self.is_large(*index) { run + 1 } else { 0 };
            run == count
        })?;
        self.take_large(first, count)
    }

    fn is_large(&self, index: usize) -> bool {
        self.bitmap[index * LARGE_WORDS..][..LARGE_WORDS].iter().all(|word| *word == u64::MAX)
    }

    fn take_large(&mut self, index: usize, count: usize) -> Option<HostPhysAddr> {
        self.bitmap[index * LARGE_WORDS..][..count * LARGE_WORDS].fill(0);
        self.free -= (count * LARGE_WORDS) as u64 * 64;
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
        self.set_free(index / 64, 1 << (index % 64));
    }

    /// Takes a large frame back.
    ///
    /// # Panics
    ///
    /// As [`Self::free`].
    pub fn free_large(&mut self, frame: HostPhysAddr) {
        let first = (frame.as_u64() / FRAME) as usize / 64;
        for word in first..first + LARGE_WORDS {
            assert!(self.bitmap[word] == 0, "freed twice: a part of {frame:?}");
            self.set_free(word, u64::MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::vec;
    use std::vec::Vec;

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

    /// Against one bit after the other.
    #[test]
    fn words_are_filled_as_frames_would_be() {
        const FRAMES: u64 = 3 * 64;
        for (start, end) in (0..=FRAMES).flat_map(|start| (0..=FRAMES + 2).map(move |e| (start, e)))
        {
            let mut bitmap = [0; 3];
            let mut frames = FrameAllocator::new(&mut bitmap);
            frames.add(64 * FRAME, 66 * FRAME);
            frames.add(start * FRAME, end * FRAME);
            let expected = |frame| (64..66).contains(&frame) || (start..end).contains(&frame);
            let count = (0..FRAMES).filter(|frame| expected(*frame)).count() as u64;
            assert_eq!(frames.free_bytes(), count * FRAME, "{start} {end}");
            let given = core::iter::from_fn(|| frames.allocate());
            let given: Vec<_> = given.map(|frame| frame.as_u64() / FRAME).collect();
            assert_eq!(given, (0..FRAMES).filter(|frame| expected(*frame)).collect::<Vec<_>>());
        }
    }

    /// As many as a VM of 1 TiB takes, with a hole of as much below them: nothing is looked at again
    /// and again.
    #[test]
    fn a_huge_machine_is_handed_out_quickly() {
        const TIB: u64 = 1 << 40;
        let mut bitmap = vec![0; FrameAllocator::words(2 * TIB)];
        let mut frames = FrameAllocator::new(&mut bitmap);
        frames.add(1 << 20, 1 << 30);
        frames.add(TIB, 2 * TIB);
        let start = std::time::Instant::now();
        let mut expected = 2 * TIB;
        for _ in 0..TIB / LARGE_FRAME {
            expected -= LARGE_FRAME;
            assert_eq!(frames.allocate_large().unwrap().as_u64(), expected);
        }
        // The next ones are across the hole.
        assert_eq!(frames.allocate_large().unwrap().as_u64(), (1 << 30) - LARGE_FRAME);
        let again = HostPhysAddr::new_truncate(TIB + (1 << 30));
        frames.free_large(again);
        assert_eq!(frames.allocate_large(), Some(again));
        assert_eq!(frames.allocate_large().unwrap().as_u64(), (1 << 30) - 2 * LARGE_FRAME);
        assert!(start.elapsed().as_secs() < 60, "{:?}", start.elapsed());
    }

    #[test]
    fn a_large_frame_is_whole_again_when_its_last_frame_is_freed() {
        let mut bitmap = [0; FrameAllocator::words(4 << 20)];
        let mut frames = FrameAllocator::new(&mut bitmap);
        frames.add(0, 4 << 20);
        let small: Vec<_> = core::iter::from_fn(|| frames.allocate()).collect();
        assert_eq!(frames.allocate_large(), None);
        small[512..1023].iter().for_each(|frame| frames.free(*frame));
        assert_eq!(frames.allocate_large(), None);
        frames.free(small[1023]);
        assert_eq!(frames.allocate_large(), HostPhysAddr::new(2 << 20));
        assert_eq!(frames.allocate_large(), None);
    }

    #[test]
    fn a_run_is_found_between_holes() {
        const MIB: u64 = 1 << 20;
        let mut bitmap = [0; FrameAllocator::words(64 * MIB)];
        let mut frames = FrameAllocator::new(&mut bitmap);
        frames.add(MIB, 20 * MIB);
        // Two large frames and a half at either side of a hole.
        frames.add(31 * MIB, 37 * MIB);
        frames.add(38 * MIB, 43 * MIB);
        assert_eq!(frames.allocate_run(4).map(HostPhysAddr::as_u64), Some(12 * MIB));
        assert_eq!(frames.allocate_run(6), None);
        assert_eq!(frames.allocate_run(2).map(HostPhysAddr::as_u64), Some(38 * MIB));
        assert_eq!(frames.free_bytes(), 18 * MIB);
        assert_eq!(frames.allocate_large().map(HostPhysAddr::as_u64), Some(34 * MIB));
    }

    #[test]
    fn a_condemned_frame_does_not_come_back() {
        let mut bitmap = [0; FrameAllocator::words(6 << 20)];
        let mut frames = FrameAllocator::new(&mut bitmap);
        frames.add(2 << 20, 6 << 20);
        let large = frames.allocate_large().unwrap();
        let in_use = HostPhysAddr::new_truncate(large.as_u64() + 5 * FRAME);
        let free = HostPhysAddr::new_truncate(2 << 20);
        for frame in [in_use, free, free] {
            assert!(frames.condemn(frame));
        }
        frames.free_large(large);
        assert_eq!(frames.free_bytes(), (4 << 20) - 2 * FRAME);
        assert_eq!(frames.allocate_large(), None);
        let given: BTreeSet<_> = core::iter::from_fn(|| frames.allocate()).collect();
        assert_eq!(given.len(), 1022);
        assert!(!given.contains(&in_use) && !given.contains(&free));
        // Far above.
        assert!(frames.condemn(HostPhysAddr::new_truncate(1 << 40)));
    }

    #[test]
    fn memory_above_the_bitmap_is_left_out() {
        let mut bitmap = [0; FrameAllocator::words(1 << 20)];
        let mut frames = FrameAllocator::new(&mut bitmap);
        frames.add(0, u64::MAX);
        assert_eq!(frames.free_bytes(), 1 << 20);
    }
}
