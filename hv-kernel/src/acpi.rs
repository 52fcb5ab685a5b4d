//! What the hypervisor wants of ACPI: which CPUs there are, how to switch the machine off and how to
//! restart it, and on which serial port the firmware has its console.
//!
//! Source: ACPI Specification, sections "Root System Description Pointer", "Fixed ACPI Description
//! Table", "Generic Address Structure", "Multiple APIC Description Table (MADT)" and "\_Sx (System
//! States)"; Microsoft's "Serial Port Console Redirection Table". The `\_S5` object is found by its
//! name in the DSDT and read by hand: it is a package of constants, and no interpreter is trusted
//! for that.

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

/// A register of one byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    /// In I/O space.
    Port(u16),
    /// In memory.
    Memory(HostPhysAddr),
    /// In the configuration space of a device on PCI bus 0.
    Pci {
        /// The device.
        device: u8,
        /// Its function.
        function: u8,
        /// The register.
        offset: u8,
    },
}

/// What the end of a run needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Power {
    /// Who made the tables.
    pub oem: [u8; 6],
    /// How to switch off, where that could be made out.
    pub soft_off: Option<SoftOff>,
    /// The reset register and what must be written to it, where there is one.
    pub reset: Option<(Register, u8)>,
}

/// Where the registers of a UART are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UartRegisters {
    /// Eight ports from this one on.
    Ports(u16),
    /// In memory.
    Memory {
        /// The first one.
        base: HostPhysAddr,
        /// From one register to the next, in bytes.
        stride: u8,
        /// How many bytes are read and written at once: 1, 2 or 4.
        width: u8,
    },
}

/// The firmware's serial console: a 16550.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SerialConsole {
    /// Where it is.
    pub registers: UartRegisters,
    /// Its speed; `None` means as it is.
    pub baud: Option<u32>,
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
    let root = Root::find(memory, rsdp)?;
    let find = |signature| table(memory, root.table(memory, signature)?.0);
    let fadt = find(b"FACP");
    let soft_off = fadt.as_ref().and_then(|fadt| soft_off(memory, fadt));
    let reset = fadt.as_ref().and_then(|fadt| reset(fadt));
    let cpus = find(b"APIC").map_or(Vec::new(), |madt| cpus(&madt));
    Some(Acpi { power: Power { oem: root.oem, soft_off, reset }, cpus })
}

/// The firmware's serial console, if it is one that can be used. Allocates nothing, so that it can
/// be asked for before anything else.
pub fn serial_console(memory: &impl Physical, rsdp: u64) -> Option<SerialConsole> {
    let (spcr, length) = Root::find(memory, rsdp)?.table(memory, b"SPCR")?;
    // What follows later revisions added.
    let mut bytes = [0; 64];
    (length as usize >= bytes.len()).then_some(())?;
    self::bytes(memory, spcr, &mut bytes)?;
    parse_spcr(&bytes)
}

/// The table that names all others.
struct Root {
    oem: [u8; 6],
    /// Where its entries begin and end.
    entries: (u64, u64),
    /// Size of an entry: 8 in the XSDT, 4 in the RSDT.
    width: usize,
}

impl Root {
    fn find(memory: &impl Physical, rsdp: u64) -> Option<Self> {
        let mut pointer = [0; 36];
        bytes(memory, rsdp, &mut pointer[..20])?;
        (&pointer[..8] == b"RSD PTR " && sums_to_zero(&pointer[..20])).then_some(())?;
        let extended = pointer[15] >= 2 && {
            bytes(memory, rsdp, &mut pointer)?;
            sums_to_zero(&pointer)
        };
        let (at, width) =
            if extended { (field(&pointer, 24, 8)?, 8) } else { (field(&pointer, 16, 4)?, 4) };
        let length = checked_length(memory, at)?;
        let entries = (at + HEADER as u64, at + u64::from(length));
        Some(Self { oem: *pointer[9..].first_chunk()?, entries, width })
    }

    /// Address and length of the first whole table with this signature.
    fn table(&self, memory: &impl Physical, signature: &[u8; 4]) -> Option<(u64, u32)> {
        let (mut at, end) = self.entries;
        while at + self.width as u64 <= end {
            let mut entry = [0; 8];
            bytes(memory, at, &mut entry[..self.width])?;
            let address = u64::from_le_bytes(entry);
            let mut name = [0; 4];
            if bytes(memory, address, &mut name).is_some()
                && name == *signature
                && let Some(length) = checked_length(memory, address)
            {
                return Some((address, length));
            }
            at += self.width as u64;
        }
        None
    }
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

/// RESET_REG, where the flag RESET_REG_SUP says that it can be used, and RESET_VALUE.
fn reset(fadt: &[u8]) -> Option<(Register, u8)> {
    const RESET_REG_SUP: u64 = 1 << 10;
    (field(fadt, 112, 4)? & RESET_REG_SUP != 0).then_some(())?;
    let value = field(fadt, 128, 1)? as u8;
    let GenericAddress { space, address, .. } = GenericAddress::read(fadt, 116)?;
    let register = match space {
        GenericAddress::MEMORY => Register::Memory(HostPhysAddr::new(address)?),
        GenericAddress::PORTS => Register::Port(u16::try_from(address).ok()?),
        // Device, function and offset have 16 bits each.
        GenericAddress::PCI => Register::Pci {
            device: u8::try_from(address >> 32).ok().filter(|device| *device < 32)?,
            function: u8::try_from(address >> 16 & 0xffff).ok().filter(|number| *number < 8)?,
            offset: u8::try_from(address & 0xffff).ok()?,
        },
        _ => return None,
    };
    (address != 0).then_some((register, value))
}

/// The SPCR as far as all revisions have it.
fn parse_spcr(spcr: &[u8]) -> Option<SerialConsole> {
    /// Interface types: a 16550, a subset of one, one that the generic address describes.
    const INTERFACES: [u64; 3] = [0, 1, 0x12];
    INTERFACES.contains(&field(spcr, 36, 1)?).then_some(())?;
    let GenericAddress { space, bits, access, address } = GenericAddress::read(spcr, 40)?;
    let registers = match space {
        GenericAddress::PORTS => {
            UartRegisters::Ports(u16::try_from(address).ok().filter(|port| *port <= 0xfff8)?)
        }
        GenericAddress::MEMORY => {
            // Registers are as far apart as they are wide, or as the widest access to them. Tables
            // are found that give only one of the two.
            let wide = match bits {
                16 => 2,
                32 => 4,
                _ => 1,
            };
            let accessed = match access {
                0 => wide,
                1 => 1,
                2 => 2,
                3 => 4,
                _ => return None,
            };
            let base = HostPhysAddr::new(address)?;
            UartRegisters::Memory { base, stride: wide.max(accessed), width: accessed }
        }
        _ => return None,
    };
    let baud = match field(spcr, 58, 1)? {
        3 => Some(9_600),
        4 => Some(19_200),
        6 => Some(57_600),
        7 => Some(115_200),
        _ => None,
    };
    (address != 0).then_some(SerialConsole { registers, baud })
}

/// The generic address structure.
struct GenericAddress {
    space: u8,
    /// The register's width in bits.
    bits: u8,
    /// The logarithm of the access size in bytes, plus 1; 0 says nothing.
    access: u8,
    address: u64,
}

impl GenericAddress {
    const MEMORY: u8 = 0;
    const PORTS: u8 = 1;
    const PCI: u8 = 2;

    fn read(table: &[u8], at: usize) -> Option<Self> {
        let [space, bits, _, access] = *table.get(at..)?.first_chunk()?;
        Some(Self { space, bits, access, address: field(table, at + 4, 8)? })
    }
}

/// A table whose checksum holds.
fn table(memory: &impl Physical, address: u64) -> Option<Vec<u8>> {
    let length = checked_length(memory, address)?;
    let mut table = vec![0; length as usize];
    bytes(memory, address, &mut table)?;
    Some(table)
}

/// The length of a table whose checksum holds.
fn checked_length(memory: &impl Physical, address: u64) -> Option<u32> {
    let mut header = [0; HEADER];
    bytes(memory, address, &mut header)?;
    let length = field(&header, 4, 4)? as u32;
    (HEADER as u32..=MAX_TABLE).contains(&length).then_some(())?;
    let (mut sum, mut at) = (0u8, address);
    let end = address + u64::from(length);
    while at < end {
        let mut chunk = [0; 64];
        let chunk = &mut chunk[..(end - at).min(64) as usize];
        bytes(memory, at, chunk)?;
        sum = chunk.iter().fold(sum, |sum, byte| sum.wrapping_add(*byte));
        at += chunk.len() as u64;
    }
    (sum == 0).then_some(length)
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

    /// An SPCR up to and with the baud rate, and what later revisions append.
    fn spcr(interface: u8, gas: [u8; 4], address: u64, baud: u8) -> Vec<u8> {
        let mut body = [0; 80 - HEADER];
        body[0] = interface;
        body[4..8].copy_from_slice(&gas);
        body[8..16].copy_from_slice(&address.to_le_bytes());
        body[58 - HEADER] = baud;
        table_of(b"SPCR", &body)
    }

    #[test]
    fn consoles_as_firmware_describes_them() {
        let ports = |port| Some(UartRegisters::Ports(port));
        let memory = |base, stride, width| {
            Some(UartRegisters::Memory { base: HostPhysAddr::new(base).unwrap(), stride, width })
        };
        for (interface, gas, address, registers) in [
            // Servers: COM1, or serial over LAN on COM2.
            (0, [1, 8, 0, 0], 0x3f8, ports(0x3f8)),
            (0, [1, 8, 0, 1], 0x2f8, ports(0x2f8)),
            (0x12, [1, 32, 0, 3], 0x3f8, ports(0x3f8)),
            (1, [1, 0, 0, 0], 0x3e8, ports(0x3e8)),
            // A PCI card.
            (0, [1, 8, 0, 1], 0xe000, ports(0xe000)),
            // The chipset's own: registers of 32 bits.
            (0x12, [0, 32, 0, 3], 0xfe03_4000, memory(0xfe03_4000, 4, 4)),
            (0, [0, 8, 0, 3], 0xfe03_4000, memory(0xfe03_4000, 4, 4)),
            (0x12, [0, 32, 0, 0], 0xfe03_4000, memory(0xfe03_4000, 4, 4)),
            (0x12, [0, 32, 0, 1], 0xfedc_9000, memory(0xfedc_9000, 4, 1)),
            (1, [0, 8, 0, 0], 0xfed0_0000, memory(0xfed0_0000, 1, 1)),
            // Not a 16550, not switched on, no such place.
            (3, [0, 32, 0, 3], 0x900_0000, None),
            (0, [1, 8, 0, 0], 0, None),
            (0, [1, 8, 0, 0], 0x1_03f8, None),
            (0, [1, 8, 0, 0], 0xfffc, None),
            (0, [0, 64, 0, 4], 0xfed0_0000, None),
            (0, [2, 8, 0, 0], 0x3f8, None),
            (0, [0, 8, 0, 0], u64::MAX, None),
        ] {
            let found = parse_spcr(&spcr(interface, gas, address, 0));
            assert_eq!(found.map(|console| console.registers), registers, "{gas:?} {address:#x}");
        }
        let baud = |code| parse_spcr(&spcr(0, [1, 8, 0, 0], 0x3f8, code)).unwrap().baud;
        let rates = [None, Some(9_600), Some(19_200), Some(57_600), Some(115_200), None];
        assert_eq!([0, 3, 4, 6, 7, 9].map(baud), rates);
    }

    #[test]
    fn the_console_is_found_behind_the_root_table() {
        let mut memory = machine();
        assert_eq!(serial_console(&memory, 0), None);
        memory.0[0x100..0x200].fill(0);
        let entries = [0x300u32, 0x800].map(u32::to_le_bytes).concat();
        let root = table_of(b"RSDT", &entries);
        memory.0[0x100..0x100 + root.len()].copy_from_slice(&root);
        let table = spcr(0, [1, 8, 0, 1], 0x2f8, 7);
        memory.0[0x800..0x800 + table.len()].copy_from_slice(&table);
        let console = SerialConsole { registers: UartRegisters::Ports(0x2f8), baud: Some(115_200) };
        assert_eq!(serial_console(&memory, 0), Some(console));
        memory.0[0x800 + 58] ^= 1;
        assert_eq!(serial_console(&memory, 0), None);
        let short = table_of(b"SPCR", &table[HEADER..60]);
        memory.0[0x800..0x800 + short.len()].copy_from_slice(&short);
        assert_eq!(serial_console(&memory, 0), None);
    }

    #[test]
    fn the_reset_register_counts_where_it_is_said_to_work() {
        let fadt = |gas: [u8; 4], address: u64, flags: u32| {
            let mut fadt = vec![0; 132];
            fadt[112..116].copy_from_slice(&flags.to_le_bytes());
            fadt[116..120].copy_from_slice(&gas);
            fadt[120..128].copy_from_slice(&address.to_le_bytes());
            fadt[128] = 6;
            fadt
        };
        let works = 1 << 10;
        for (gas, address, flags, register) in [
            ([1, 8, 0, 1], 0xcf9, works, Some(Register::Port(0xcf9))),
            ([1, 8, 0, 0], 0x64, works | 0x4a5, Some(Register::Port(0x64))),
            ([1, 8, 0, 1], 0xcf9, 0, None),
            ([1, 8, 0, 1], 0, works, None),
            ([1, 8, 0, 1], 0x1_0cf9, works, None),
            (
                [0, 8, 0, 1],
                0xfed0_0010,
                works,
                HostPhysAddr::new(0xfed0_0010).map(Register::Memory),
            ),
            (
                [2, 8, 0, 1],
                0x1f_0000_0040,
                works,
                Some(Register::Pci { device: 31, function: 0, offset: 0x40 }),
            ),
            ([2, 8, 0, 1], 0x20_0000_0040, works, None),
            ([0x7f, 8, 0, 1], 0xcf9, works, None),
        ] {
            let found = reset(&fadt(gas, address, flags));
            assert_eq!(found, register.map(|register| (register, 6)), "{gas:?} {address:#x}");
        }
        assert_eq!(reset(&fadt([1, 8, 0, 1], 0xcf9, works)[..128]), None);
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
