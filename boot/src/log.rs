//! The log that outlives a restart: an area of memory into which the kernel writes what it logs, and
//! in which the loader finds it after a warm reset, to save it on the stick.
//!
//! It is the first file of the ramdisk, which lies at a multiple of [`ALIGN`]: the loader looks there
//! and needs no other trace of the run before. Memory keeps its contents over a warm reset; what the
//! firmware has overwritten no longer has a valid head.

use bootloader_api::info::MemoryRegionKind;

use crate::memory_map::MemoryMap;

/// Its name in the ramdisk.
pub const NAME: &str = "unsplit/log";

/// Its size in bytes.
pub const BYTES: u64 = 128 << 10;

/// The ramdisk's alignment in bytes.
pub const ALIGN: u64 = 1 << 20;

/// Where it begins, from the start of the ramdisk: after the head of the archive's first file.
pub const OFFSET: u64 = 512;

/// How an area begins that holds a log.
const MAGIC: [u8; 16] = *b"Unsplit's log 1\n";

/// Size of the head in bytes: magic, length of the text, and its complement.
const HEAD: usize = 32;

/// The last line of a text for which there was no room.
const FULL: &[u8] = b"\n(here the log was full)\n";

/// A log that is being written.
pub struct Log<'a> {
    area: &'a mut [u8],
    used: usize,
}

impl<'a> Log<'a> {
    /// An empty log in `area`; `None` if that is too small.
    pub fn begin(area: &'a mut [u8]) -> Option<Self> {
        if area.len() < HEAD + FULL.len() {
            return None;
        }
        area[..MAGIC.len()].copy_from_slice(&MAGIC);
        let mut log = Self { area, used: 0 };
        log.set_length();
        Some(log)
    }

    /// Adds text. What does not fit is left out, and the log says so.
    pub fn append(&mut self, text: &[u8]) {
        let end = self.area.len() - FULL.len();
        let start = HEAD + self.used;
        if start > end {
            return;
        }
        let fits = text.len().min(end - start);
        self.put(&text[..fits]);
        if fits < text.len() {
            self.put(FULL);
        }
        self.set_length();
    }

    fn put(&mut self, text: &[u8]) {
        self.area[HEAD + self.used..][..text.len()].copy_from_slice(text);
        self.used += text.len();
    }

    /// After the text: until then, the length tells of what is there.
    fn set_length(&mut self) {
        let length = self.used as u64;
        self.area[16..24].copy_from_slice(&length.to_le_bytes());
        self.area[24..32].copy_from_slice(&(!length).to_le_bytes());
    }
}

/// The text of the log in `area`, if it holds one.
pub fn text(area: &[u8]) -> Option<&[u8]> {
    let (head, text) = area.split_at_checked(HEAD)?;
    let number = |at: usize| head[at..at + 8].try_into().map(u64::from_le_bytes).ok();
    let (length, complement) = (number(16)?, number(24)?);
    if !head.starts_with(&MAGIC) || length != !complement {
        return None;
    }
    text.get(..usize::try_from(length).ok()?)
}

/// The addresses at which an area of [`BYTES`] bytes can be that an earlier run left in what is now
/// free memory below `end`.
pub fn places(map: &MemoryMap, end: u64) -> impl Iterator<Item = u64> {
    let free = map.regions().iter().filter(|region| region.kind == MemoryRegionKind::Usable);
    free.flat_map(move |region| {
        let last = region.end.min(end).saturating_sub(OFFSET + BYTES);
        let starts = region.start.next_multiple_of(ALIGN)..=last;
        starts.step_by(ALIGN as usize).map(|start| start + OFFSET)
    })
}

/// Makes `area` hold no log, so that it is saved once.
pub fn erase(area: &mut [u8]) {
    area.iter_mut().take(HEAD).for_each(|byte| *byte = 0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PAGE, memory_map::E820Entry};

    #[test]
    fn what_was_written_is_found_once() {
        let mut area = [0xa5; 200];
        assert_eq!(text(&area), None);
        let mut log = Log::begin(&mut area).unwrap();
        log.append(b"one\n");
        log.append(b"two\n");
        assert_eq!(text(&area), Some(&b"one\ntwo\n"[..]));
        assert_eq!(text(&area[..39]), None);
        assert_eq!(text(&area[..20]), None);
        erase(&mut area);
        assert_eq!(text(&area), None);
    }

    #[test]
    fn places_are_in_free_memory_as_a_whole() {
        let room = OFFSET + BYTES;
        let reported = [
            (0, 0x9_f000, 1),
            (0x10_0000, 0x20_0000, 1),
            (0x40_0000, 0x10_0000, 2),
            (0x50_0000 - PAGE, PAGE + room - 1, 1),
            (0x80_0000, 0x10_0000 + room.next_multiple_of(PAGE), 1),
            (0xfff0_0000, 0x1000_0000, 1),
        ]
        .map(|(start, len, kind)| E820Entry { start, len, kind }.into());
        let map = MemoryMap::new(&reported).unwrap();
        let found: Vec<_> = places(&map, 1 << 32).map(|at| at - OFFSET).collect();
        assert_eq!(found, [0, 0x10_0000, 0x20_0000, 0x80_0000, 0x90_0000, 0xfff0_0000]);
        assert_eq!(places(&map, 0x10_0000 + room).count(), 2);
        assert_eq!(places(&map, 0x10_0000 + room - 1).count(), 1);
    }

    #[test]
    fn damage_of_the_head_is_seen() {
        let mut area = [0; 100];
        Log::begin(&mut area).unwrap().append(b"text");
        for bit in 0..HEAD * 8 {
            let mut damaged = area;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(text(&damaged), None, "bit {bit}");
        }
    }

    #[test]
    fn a_full_log_says_so_and_takes_no_more() {
        for size in 0..300 {
            let mut area = vec![0; size];
            let Some(mut log) = Log::begin(&mut area) else {
                assert!(size < HEAD + FULL.len());
                continue;
            };
            (0..20).for_each(|_| log.append(b"nineteen characters"));
            let text = text(&area).unwrap();
            assert!(text.ends_with(FULL), "{size}");
            assert_eq!(text.len(), size - HEAD);
        }
    }
}
