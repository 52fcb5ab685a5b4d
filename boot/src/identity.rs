//! Page tables that map memory at its own address, with all rights: for the short time in which the
//! loader is on its own and the kernel's tables are not in force yet. Firmware's may lack what it
//! takes to be free, or forbid to execute it.

use core::ops::Range;

use x86_64::structures::paging::page_table::PageTableFlags as Flags;

/// A page table.
#[repr(C, align(4096))]
#[derive(Clone)]
pub struct Table([u64; 512]);

impl Table {
    /// A table that maps nothing.
    pub const EMPTY: Self = Self([0; 512]);
}

/// The physical address bits of an entry that points to a table.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// What the entries of the lowest tables in use stand for.
const LARGE_PAGE: u64 = 1 << 21;

/// Fills `tables`, which are empty and lie at the physical address `at`, so that they map `ranges` and
/// what shares a large page with them; whether there were enough of them. The first one is the
/// highest, of level 5 or 4.
pub fn map(
    tables: &mut [Table],
    at: u64,
    five_level: bool,
    ranges: impl IntoIterator<Item = Range<u64>>,
) -> bool {
    let mut used = 1;
    let mut set = |address: u64| {
        let mut table = 0;
        for level in (3..=if five_level { 5 } else { 4 }).rev() {
            let slot = index(address, level);
            let entry = tables[table].0[slot];
            table = if entry == 0 {
                let new = used;
                if new == tables.len() {
                    return false;
                }
                let flags = (Flags::PRESENT | Flags::WRITABLE).bits();
                tables[table].0[slot] = (at + (new * size_of::<Table>()) as u64) | flags;
                used += 1;
                new
            } else {
                ((entry & ADDRESS) - at) as usize / size_of::<Table>()
            };
        }
        let flags = Flags::PRESENT | Flags::WRITABLE | Flags::HUGE_PAGE;
        tables[table].0[index(address, 2)] = address | flags.bits();
        true
    };
    ranges.into_iter().all(|range| {
        let first = range.start - range.start % LARGE_PAGE;
        (first..range.end).step_by(LARGE_PAGE as usize).all(&mut set)
    })
}

/// The entry for `address` in a table of `level`, counted from 1.
fn index(address: u64, level: u32) -> usize {
    (address >> (12 + 9 * (level - 1))) as usize & 0x1ff
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: u64 = 0x7654_3000;

    /// What the CPU would find at `address`.
    fn walk(tables: &[Table], address: u64, levels: u32) -> Option<u64> {
        let mut table = 0;
        for level in (3..=levels).rev() {
            let entry = tables[table].0[index(address, level)];
            if entry == 0 {
                return None;
            }
            assert_eq!(entry & 0xfff, 3);
            table = (entry - 3 - AT) as usize / 4096;
        }
        let entry = tables[table].0[index(address, 2)];
        (entry != 0).then(|| {
            assert_eq!(entry & (1 << 63 | 0x1f_ffff), 0x83);
            (entry - 0x83) + address % LARGE_PAGE
        })
    }

    #[test]
    fn everything_is_where_it_is() {
        for five_level in [false, true] {
            let levels = if five_level { 5 } else { 4 };
            let far = (0x123_4567_8000, 0x123_4567_8001);
            let mut tables = vec![Table::EMPTY; 16];
            assert!(map(&mut tables, AT, five_level, [0..1 << 32, far.0..far.1, 0..0x1000]));
            for address in [0, 0xfff, 0x20_0000, 0xdead_beef, 0xffff_ffff, far.0, far.0 - 0x7_8000]
            {
                assert_eq!(walk(&tables, address, levels), Some(address), "{address:#x}");
            }
            for address in [1 << 32, far.0 - LARGE_PAGE, far.0 + LARGE_PAGE, 1 << 39] {
                assert_eq!(walk(&tables, address, levels), None, "{address:#x}");
            }
        }
    }

    #[test]
    fn too_few_tables_are_noticed() {
        let needed = 2 + 4;
        let range = Some(0..1 << 32);
        assert!(!map(&mut vec![Table::EMPTY; needed - 1], AT, false, range.clone()));
        assert!(map(&mut vec![Table::EMPTY; needed], AT, false, range.clone()));
        assert!(!map(&mut vec![Table::EMPTY; needed], AT, true, range.clone()));
    }
}
