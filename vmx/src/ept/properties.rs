//! Random sequences of operations, compared with a model: a map from addresses to pages.

use std::collections::{BTreeMap, BTreeSet};
use std::vec::Vec;

use proptest::prelude::*;
use proptest::sample::select;

use super::tests::Recorder;
use super::*;

/// A page as the model has it.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Leaf {
    hpa: u64,
    size: PageSize,
    permissions: Permissions,
    kind: u64,
    flags: u64,
}

/// Pages by their first guest-physical address.
type Model = BTreeMap<u64, Leaf>;

#[derive(Debug, Clone)]
enum Operation {
    Map {
        gpa: u64,
        hpa: u64,
        size: PageSize,
        permissions: Permissions,
        kind: MemoryType,
    },
    Unmap {
        gpa: u64,
    },
    Split {
        gpa: u64,
    },
    Protect {
        gpa: u64,
        permissions: Permissions,
    },
    /// What the CPU does.
    Use {
        gpa: u64,
        flags: u64,
    },
    Clear {
        gpa: u64,
    },
}

fn size() -> impl Strategy<Value = PageSize> {
    select(Vec::from([PageSize::Size4K, PageSize::Size2M, PageSize::Size1G]))
}

/// Few different addresses, so that operations meet: at both ends of tables of each level, now
/// and then unaligned or beyond what four levels reach.
fn address() -> impl Strategy<Value = u64> {
    let index = || select(Vec::from([0u64, 511]));
    let bits = (index(), index(), index(), index());
    let odd = prop_oneof![20 => Just(0u64), 1 => 1u64..0x1000, 1 => Just(1 << 48)];
    (bits, 0u32..4, odd).prop_map(|((a, b, c, d), level, odd)| {
        let address = a << 39 | b << 30 | c << 21 | d << 12;
        address & !((4096 << (9 * level) >> 9) - 1) | odd
    })
}

fn permissions() -> impl Strategy<Value = Permissions> {
    prop_oneof![9 => 0u64..4, 1 => Just(4)].prop_map(|bits| {
        // Mostly readable, at times not.
        Permissions::from_bits_truncate(if bits == 4 { 2 } else { bits << 1 | 1 })
    })
}

fn operation() -> impl Strategy<Value = Operation> {
    let kind = select(Vec::from([MemoryType::Uncacheable, MemoryType::WriteBack]));
    let map = (address(), address(), size(), permissions(), kind, any::<bool>()).prop_map(
        |(gpa, hpa, size, permissions, kind, aligned)| {
            let mask = if aligned { !(size.bytes() - 1) } else { u64::MAX };
            Operation::Map { gpa: gpa & mask, hpa: hpa & mask, size, permissions, kind }
        },
    );
    prop_oneof![
        4 => map,
        2 => address().prop_map(|gpa| Operation::Unmap { gpa }),
        2 => address().prop_map(|gpa| Operation::Split { gpa }),
        1 => (address(), permissions())
            .prop_map(|(gpa, permissions)| Operation::Protect { gpa, permissions }),
        1 => (address(), select(Vec::from([ACCESSED, ACCESSED | DIRTY])))
            .prop_map(|(gpa, flags)| Operation::Use { gpa, flags }),
        1 => address().prop_map(|gpa| Operation::Clear { gpa }),
    ]
}

/// The page that holds `gpa`, and where it starts.
fn holding(model: &Model, gpa: u64) -> Option<(u64, Leaf)> {
    let (start, leaf) = model.range(..=gpa).next_back()?;
    (gpa - start < leaf.size.bytes()).then_some((*start, *leaf))
}

fn occupied(model: &Model, start: u64, bytes: u64) -> bool {
    holding(model, start).is_some() || model.range(start..start + bytes).next().is_some()
}

/// What the operation is to do to the model, with memory for `budget` more tables.
fn expect(model: &mut Model, operation: &Operation, budget: usize) -> Result<(), MapError> {
    match *operation {
        Operation::Map { gpa, hpa, size, permissions, kind } => {
            if gpa >= 1 << 48 || gpa % size.bytes() != 0 || hpa % size.bytes() != 0 {
                return Err(MapError::BadAddress);
            }
            if !permissions.contains(Permissions::READ) {
                return Err(MapError::BadPermissions);
            }
            if occupied(model, gpa, size.bytes()) {
                return Err(MapError::Occupied);
            }
            // A table exists where something is mapped in the range that it covers.
            let covers = (size.level() + 1..=ROOT_LEVEL).map(|level| 4096u64 << (9 * level));
            let missing =
                covers.filter(|bytes| !occupied(model, gpa & !(bytes - 1), *bytes)).count();
            if missing > budget {
                return Err(MapError::OutOfMemory);
            }
            model.insert(gpa, Leaf { hpa, size, permissions, kind: kind as u64, flags: 0 });
        }
        Operation::Unmap { gpa } => {
            if let Some((start, _)) = holding(model, gpa) {
                model.remove(&start);
            }
        }
        Operation::Split { gpa } => {
            let (start, leaf) = holding(model, gpa).ok_or(MapError::NotMapped)?;
            let size = match leaf.size {
                PageSize::Size4K => return Err(MapError::NotMapped),
                PageSize::Size2M => PageSize::Size4K,
                PageSize::Size1G => PageSize::Size2M,
            };
            if budget == 0 {
                return Err(MapError::OutOfMemory);
            }
            for part in 0..512 {
                let offset = part * size.bytes();
                model.insert(start + offset, Leaf { hpa: leaf.hpa + offset, size, ..leaf });
            }
        }
        Operation::Protect { gpa, permissions } => {
            if !permissions.contains(Permissions::READ) {
                return Err(MapError::BadPermissions);
            }
            let (start, leaf) = holding(model, gpa).ok_or(MapError::NotMapped)?;
            model.insert(start, Leaf { permissions, ..leaf });
        }
        Operation::Use { gpa, flags } => {
            if let Some((start, leaf)) = holding(model, gpa) {
                model.insert(start, Leaf { flags: leaf.flags | flags, ..leaf });
            }
        }
        Operation::Clear { gpa } => {
            let (start, leaf) = holding(model, gpa).ok_or(MapError::NotMapped)?;
            model.insert(start, Leaf { flags: 0, ..leaf });
        }
    }
    Ok(())
}

fn apply(ept: &mut Ept, memory: &mut Recorder, operation: &Operation) -> Result<(), MapError> {
    let at = GuestPhysAddr::new_truncate;
    match *operation {
        Operation::Map { gpa, hpa, size, permissions, kind } => {
            ept.map(memory, at(gpa), HostPhysAddr::new_truncate(hpa), size, permissions, kind)
        }
        Operation::Unmap { gpa } => {
            ept.unmap(memory, at(gpa)).held_by_none();
            Ok(())
        }
        Operation::Split { gpa } => ept.split(memory, at(gpa)).map(StaleTranslations::held_by_none),
        Operation::Protect { gpa, permissions } => {
            ept.protect(memory, at(gpa), permissions).map(StaleTranslations::held_by_none)
        }
        Operation::Use { gpa, flags } => {
            if let Some((table, index, _, entry)) = ept.leaf(memory, at(gpa)) {
                memory.write(table, index, entry | flags);
            }
            Ok(())
        }
        Operation::Clear { gpa } => {
            ept.clear_accessed_dirty(memory, at(gpa)).map(StaleTranslations::held_by_none)
        }
    }
}

/// Reads the tables as the CPU would: what they map, and which of them can be reached. Asserts
/// that no reserved bit is set and that no table but the root is empty.
fn read_tables(memory: &Recorder, pointer: u64) -> (Model, BTreeSet<u64>) {
    let (mut model, mut reached) = (Model::new(), BTreeSet::new());
    let mut waiting = Vec::from([(pointer & !0xfff, 3u32, 0u64)]);
    while let Some((table, level, base)) = waiting.pop() {
        assert!(reached.insert(table), "{table:#x} is linked twice");
        let entries = &memory.tables[&table];
        let empty = entries.iter().all(|entry| *entry == 0);
        assert!(level == 3 || !empty, "{table:#x} is empty");
        for (index, entry) in (0u64..).zip(entries.iter().copied()).filter(|(_, e)| *e != 0) {
            let gpa = base + (index << (12 + 9 * level));
            let size = match level {
                0 => PageSize::Size4K,
                1 if entry & 0x80 != 0 => PageSize::Size2M,
                2 if entry & 0x80 != 0 => PageSize::Size1G,
                _ => {
                    assert_eq!(entry & !0x000f_ffff_ffff_f000, 7, "a table's entry: {entry:#x}");
                    waiting.push((entry & !0xfff, level - 1, gpa));
                    continue;
                }
            };
            let hpa = entry & 0x000f_ffff_ffff_f000;
            assert!(entry & 1 != 0 && hpa % size.bytes() == 0 && entry >> 52 == 0);
            assert!(level > 0 || entry & 0x80 == 0, "bit 7 is reserved in a 4-KiB leaf");
            let permissions = Permissions::from_bits_truncate(entry);
            let (kind, flags) = (entry >> 3 & 7, entry & 0x300);
            model.insert(gpa, Leaf { hpa, size, permissions, kind, flags });
        }
    }
    (model, reached)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn the_tables_are_the_model(
        operations in prop::collection::vec((operation(), 0usize..6), 1..40),
        probes in prop::collection::vec((address(), 0u64..0x1000), 20),
    ) {
        let mut memory = Recorder::with_limit(1);
        let mut ept = Ept::new(&mut memory, true).unwrap();
        let mut model = Model::new();
        for (operation, budget) in &operations {
            memory.limit = memory.tables.len() + budget;
            let before = model.clone();
            let expected = expect(&mut model, operation, *budget);
            prop_assert!(expected.is_ok() || model == before);
            prop_assert_eq!(apply(&mut ept, &mut memory, operation), expected, "{:?}", operation);
            let (mapped, reached) = read_tables(&memory, ept.pointer());
            prop_assert!(mapped == model, "after {:?}", operation);
            prop_assert!(reached.iter().eq(memory.tables.keys()), "a table is lost");
        }
        for (address, offset) in probes {
            let gpa = address & !0xfff | offset;
            let page = ept.page(&memory, GuestPhysAddr::new_truncate(gpa));
            let expected = holding(&model, gpa).map(|(start, leaf)| Page {
                hpa: HostPhysAddr::new_truncate(leaf.hpa + (gpa - start)),
                size: leaf.size,
                permissions: leaf.permissions,
                accessed: leaf.flags & ACCESSED != 0,
                dirty: leaf.flags & DIRTY != 0,
            });
            prop_assert_eq!(page, expected);
        }
        ept.destroy(&mut memory).held_by_none();
        prop_assert!(memory.tables.is_empty());
    }
}
