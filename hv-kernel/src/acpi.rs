//! What the hypervisor wants of ACPI: which CPUs there are, and how to switch the machine off.
//!
//! Source: ACPI Specification, sections "Root System Description Pointer", "Fixed ACPI Description
//! Table", "Multiple APIC Description Table (MADT)" and "\_Sx (System States)". The `\_S5` object
//! is found by its name in the DSDT and read by hand: it is a package of constants, and no
//! interpreter is trusted for that.

use alloc::collections::BTreeSet;
use alloc::vec;
use alloc::vec::Vec;

use vmx::addr::HostPhysAddr;

/// Physical memory, as the tables are read from it.
pub trait Physical {
    /// Copies from `address` into `buffer`; false where no memory is mapped.
    fn read(&self, address: HostPhysAddr, buffer: &mut [u8]) -> bool;
}

/// A table longer than this is not believed.
const MAX_TABLE: u32 = 4 << 20;
/// Length of the header that all tables share.
const HEADER: usize = 36;

/// How to enter S5, "soft off".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SoftOff {
    /// The ports PM1a_CNT and PM1b_CNT, and SLP_TYP for each.
    pub controls: [Option<(u16, u8)>; 2],
    /// SMI_CMD and the value that switches ACPI on, where it must be switched on.
    pub enable: Option<(u16, u8)>,
}

/// What the end of a run needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Power {
    /// Who made the tables.
    pub oem: [u8; 6],
    /// How to switch off, where that could be made out.
    pub soft_off: Option<SoftOff>,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acpi {
    /// What the end of a run needs.
    pub power: Power,
    /// The local APIC IDs of the CPUs that can be used, in the table's order, each once; none
    /// without a valid MADT.
    pub cpus: Vec<u32>,
}

/// Reads the tables behind the RSDP at `rsdp`. `None` where they are not valid.
pub fn read(memory: &impl Physical, rsdp: u64) -> Option<Acpi> {
    let mut pointer = [0; 36];
    bytes(memory, rsdp, &mut pointer[..20])?;
    (&pointer[..8] == b"RSD PTR " && sums_to_zero(&pointer[..20])).then_some(())?;
    let extended = pointer[15] >= 2 && {
        bytes(memory, rsdp, &mut pointer)?;
        sums_to_zero(&pointer)
    };
    let oem = *pointer[9..].first_chunk()?;
    // XSDT with 8-byte, RSDT with 4-byte pointers.
    let (root, width) =
        if extended { (field(&pointer, 24, 8)?, 8) } else { (field(&pointer, 16, 4)?, 4) };
    let root = table(memory, root)?;
    let find = |signature: &[u8; 4]| {
        root[HEADER..]
            .chunks_exact(width)
            .filter_map(|entry| table(memory, field(entry, 0, width)?))
            .find(|table| &table[..4] == signature)
    };
    let soft_off = find(b"FACP").and_then(|fadt| soft_off(memory, &fadt));
    let cpus = find(b"APIC").map_or(Vec::new(), |madt| cpus(&madt));
    Some(Acpi { power: Power { oem, soft_off }, cpus })
}

/// Reads the MADT: behind the local APICs' address and flags, entries of a type, a length and a
/// body.
fn cpus(madt: &[u8]) -> Vec<u32> {
    /// Entry types: Processor Local APIC, Processor Local x2APIC.
    const LOCAL_APIC: u8 = 0;
    const LOCAL_X2APIC: u8 = 9;
    /// A Processor Local APIC with this ID is a place for a CPU that is not there.
    const NO_ID: u64 = 0xff;
    /// Flags of a CPU. One without it is absent, or must be plugged in first ("online capable").
    const ENABLED: u64 = 1 << 0;

    let mut apic_ids = Vec::new();
    let mut known = BTreeSet::new();
    let mut rest = madt.get(44..).unwrap_or_default();
    while let [kind, length, ..] = *rest {
        let Some((entry, next)) =
            rest.split_at_checked(length.into()).filter(|(entry, _)| entry.len() >= 2)
        else {
            break;
        };
        rest = next;
        let cpu = match kind {
            LOCAL_APIC => field(entry, 3, 1).filter(|id| *id != NO_ID).zip(field(entry, 4, 4)),
            LOCAL_X2APIC => field(entry, 4, 4).zip(field(entry, 8, 4)),
            _ => None,
        };
        if let Some((id, flags)) = cpu
            && flags & ENABLED != 0
            && known.insert(id)
        {
            apic_ids.push(id as u32);
        }
    }
    apic_ids
}

fn soft_off(memory: &impl Physical, fadt: &[u8]) -> Option<SoftOff> {
    let dsdt = field(fadt, 140, 8).filter(|address| *address != 0);
    let dsdt = table(memory, dsdt.or_else(|| field(fadt, 40, 4))?)?;
    let types = s5_types(&dsdt[HEADER..])?;
    let port =
        |at| field(fadt, at, 4).and_then(|port| u16::try_from(port).ok()).filter(|p| *p != 0);
    let controls = [port(64).map(|port| (port, types[0])), port(68).map(|port| (port, types[1]))];
    controls[0]?;
    let value = field(fadt, 52, 1)? as u8;
    Some(SoftOff { controls, enable: port(48).filter(|_| value != 0).map(|port| (port, value)) })
}

/// `Name (\_S5, Package { SLP_TYPa, SLP_TYPb, ... })` in AML: NameOp, "_S5_", PackageOp, a package
/// length, the number of elements, the elements.
fn s5_types(aml: &[u8]) -> Option<[u8; 2]> {
    const NAME: [u8; 5] = *b"_S5_\x12";
    let at = aml.windows(NAME.len()).position(|window| window == NAME)? + NAME.len();
    // Bits 7:6 of the first byte: how many more bytes the length has.
    let length_bytes = 1 + usize::from(aml.get(at)? >> 6);
    let mut elements = aml.get(at + length_bytes + 1..)?.iter();
    let mut constant = || match elements.next()? {
        // ZeroOp, OneOp, BytePrefix.
        value @ (0 | 1) => Some(*value),
        0x0a => elements.next().copied(),
        _ => None,
    };
    let first = constant()?;
    Some([first, constant().unwrap_or(first)])
}

/// A table whose checksum holds.
fn table(memory: &impl Physical, address: u64) -> Option<Vec<u8>> {
    let mut header = [0; HEADER];
    bytes(memory, address, &mut header)?;
    let length = field(&header, 4, 4)? as u32;
    (HEADER as u32..=MAX_TABLE).contains(&length).then_some(())?;
    let mut table = vec![0; length as usize];
    bytes(memory, address, &mut table)?;
    sums_to_zero(&table).then_some(table)
}

fn bytes(memory: &impl Physical, address: u64, buffer: &mut [u8]) -> Option<()> {
    memory.read(HostPhysAddr::new(address)?, buffer).then_some(())
}

/// A little-endian field of `size` bytes.
fn field(bytes: &[u8], at: usize, size: usize) -> Option<u64> {
    let bytes = bytes.get(at..at + size)?;
    Some(bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

fn sums_to_zero(bytes: &[u8]) -> bool {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Flat(Vec<u8>);
    impl Physical for Flat {
        fn read(&self, address: HostPhysAddr, buffer: &mut [u8]) -> bool {
            let start = address.as_u64() as usize;
            let source = self.0.get(start..start.saturating_add(buffer.len()));
            source.map(|source| buffer.copy_from_slice(source)).is_some()
        }
    }

    fn seal(bytes: &mut [u8], checksum: usize) {
        bytes[checksum] = 0;
        bytes[checksum] = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
    }

    fn table_of(signature: &[u8; 4], body: &[u8]) -> Vec<u8> {
        let mut table = vec![0; HEADER];
        table[..4].copy_from_slice(signature);
        table.extend(body);
        let length = (table.len() as u32).to_le_bytes();
        table[4..8].copy_from_slice(&length);
        seal(&mut table, 9);
        table
    }

    /// The part of a MADT behind its header.
    fn madt(entries: &[&[u8]]) -> Vec<u8> {
        [&0xfee0_0000u32.to_le_bytes(), &[1, 0, 0, 0][..], &entries.concat()].concat()
    }

    const CPUS: [&[u8]; 9] = [
        &[0, 8, 0, 4, 1, 0, 0, 0],
        // An I/O APIC; not enabled; online capable; no ID.
        &[1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0],
        &[0, 8, 1, 5, 0, 0, 0, 0],
        &[0, 8, 1, 6, 2, 0, 0, 0],
        &[0, 8, 2, 0xff, 1, 0, 0, 0],
        &[0, 8, 3, 2, 1, 0, 0, 0],
        &[9, 16, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0],
        // The first one again.
        &[9, 16, 0, 0, 4, 0, 0, 0, 1, 0, 0, 0, 5, 0, 0, 0],
        &[9, 16, 0, 0, 0xff, 0, 0, 0, 3, 0, 0, 0, 6, 0, 0, 0],
    ];

    fn cpus_of(entries: &[&[u8]]) -> Vec<u32> {
        cpus(&table_of(b"APIC", &madt(entries)))
    }

    fn machine() -> Flat {
        let mut memory = vec![0; 0x1000];
        let mut put = |at: usize, bytes: &[u8]| memory[at..at + bytes.len()].copy_from_slice(bytes);
        let mut rsdp = [0; 20];
        rsdp[..8].copy_from_slice(b"RSD PTR ");
        rsdp[9..15].copy_from_slice(b"MAKER ");
        rsdp[16..20].copy_from_slice(&0x100u32.to_le_bytes());
        seal(&mut rsdp, 8);
        put(0, &rsdp);
        put(0x100, &table_of(b"RSDT", &[0x200u32.to_le_bytes(), 0x300u32.to_le_bytes()].concat()));
        put(0x200, &table_of(b"APIC", &madt(&CPUS)));
        let mut fadt = [0; 116];
        fadt[40 - HEADER..44 - HEADER].copy_from_slice(&0x400u32.to_le_bytes());
        fadt[48 - HEADER] = 0xb2;
        fadt[52 - HEADER] = 0xf1;
        fadt[64 - HEADER..66 - HEADER].copy_from_slice(&0x604u16.to_le_bytes());
        put(0x300, &table_of(b"FACP", &fadt));
        put(0x400, &table_of(b"DSDT", b"\x10\x08_S5_\x12\x06\x04\x0a\x05\x00\x00\x00"));
        Flat(memory)
    }

    #[test]
    fn soft_off_is_found() {
        let power = read(&machine(), 0).unwrap().power;
        assert_eq!(&power.oem, b"MAKER ");
        let soft_off = power.soft_off.unwrap();
        assert_eq!(soft_off.controls, [Some((0x604, 5)), None]);
        assert_eq!(soft_off.enable, Some((0xb2, 0xf1)));
    }

    #[test]
    fn usable_cpus_are_listed_once_and_in_order() {
        let cpus = read(&machine(), 0).unwrap().cpus;
        assert_eq!(cpus, [4, 2, 0x100, 0xff]);
    }

    #[test]
    fn what_follows_a_broken_entry_is_not_read() {
        let good: &[u8] = &[0, 8, 0, 4, 1, 0, 0, 0];
        let other: &[u8] = &[0, 8, 1, 5, 1, 0, 0, 0];
        for broken in [&[0, 0][..], &[0, 1], &[2, 0xff], &[0]] {
            assert_eq!(cpus_of(&[good, broken, other]), [4], "{broken:?}");
            assert_eq!(cpus_of(&[good, broken]), [4], "{broken:?}");
        }
        // Too short for its type, but its length is good.
        for short in [&[0, 2][..], &[0, 7, 0, 6, 1, 0, 0], &[9, 8, 0, 0, 6, 0, 0, 0], &[5, 4, 0, 0]]
        {
            assert_eq!(cpus_of(&[good, short, other]), [4, 5], "{short:?}");
        }
        assert_eq!(cpus_of(&[]), []);
        assert_eq!(cpus(&[0; 43]), []);
    }

    #[test]
    fn no_table_makes_the_reader_panic() {
        let good = machine();
        for at in 0..0x460 {
            for value in [0, 0x12, 0x7f, 0xff] {
                let mut memory = Flat(good.0.clone());
                memory.0[at] = value;
                let _ = read(&memory, 0);
                // The same with checksums that hold, so that what is in the tables is read.
                for table in [0x100, 0x200, 0x300, 0x400] {
                    let length = field(&memory.0, table + 4, 4).unwrap() as usize;
                    if let Some(table) = memory.0.get_mut(table..table + length)
                        && table.len() > 9
                    {
                        seal(table, 9);
                    }
                }
                let _ = read(&memory, 0);
            }
        }
        assert_eq!(read(&good, 0x10), None);
        assert_eq!(read(&good, u64::MAX), None);
        let cut = |length: usize| {
            let acpi = read(&Flat(good.0[..length].to_vec()), 0).unwrap();
            (acpi.power.soft_off.is_some(), !acpi.cpus.is_empty())
        };
        assert_eq!(
            (cut(0x220), cut(0x320), cut(0x1000)),
            ((false, false), (false, true), (true, true))
        );
    }
}
