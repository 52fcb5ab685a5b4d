//! The contents of a fresh VMCS, and what INIT and the start of a CPU make of it, as tables.

use crate::capability::{self, Capabilities};
use crate::controls::{Entry, Exit, Secondary};
use crate::exit::vector;
use crate::fields::*;

/// The exceptions that exit.
///
/// #AC and #DB always: a guest that makes the delivery of the exception raise the exception again
/// would otherwise keep the CPU in microcode for ever (CVE-2015-5307, CVE-2015-8104). #AC is also
/// what split-lock detection raises. #MC is the host's.
pub const EXCEPTIONS: u32 = 1 << vector::AC | 1 << vector::DB | 1 << vector::MC;

/// CR0 bits that the guest changes without an exit: PE, MP, EM, TS, WP, AM, PG.
pub const CR0_GUEST_OWNED: u64 = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 16 | 1 << 18 | 1 << 31;
/// CR0.PE.
pub const CR0_PE: u64 = 1 << 0;
/// CR0.ET, always 1.
pub const CR0_ET: u64 = 1 << 4;
/// CR0.NE, 1 in VMX operation whatever the guest says.
pub const CR0_NE: u64 = 1 << 5;
/// CR0.WP.
pub const CR0_WP: u64 = 1 << 16;
/// CR0.AM.
pub const CR0_AM: u64 = 1 << 18;
/// CR0.NW.
pub const CR0_NW: u64 = 1 << 29;
/// CR0.CD.
pub const CR0_CD: u64 = 1 << 30;
/// CR0.PG.
pub const CR0_PG: u64 = 1 << 31;

/// CR4.PSE.
pub const CR4_PSE: u64 = 1 << 4;
/// CR4.PAE.
pub const CR4_PAE: u64 = 1 << 5;
/// CR4.MCE: set while guests run whatever they say, so that a machine check reaches the host.
pub const CR4_MCE: u64 = 1 << 6;
/// CR4.PCIDE.
pub const CR4_PCIDE: u64 = 1 << 17;
/// CR4.OSXSAVE.
pub const CR4_OSXSAVE: u64 = 1 << 18;
/// CR4.SMEP.
pub const CR4_SMEP: u64 = 1 << 20;
/// CR4.SMAP.
pub const CR4_SMAP: u64 = 1 << 21;
/// CR4.VMXE: set while guests run, and hidden from them.
pub const CR4_VMXE: u64 = 1 << 13;

/// EFER.LME.
pub const EFER_LME: u64 = 1 << 8;
/// EFER.LMA.
pub const EFER_LMA: u64 = 1 << 10;
/// EFER.NXE.
pub const EFER_NXE: u64 = 1 << 11;

/// RFLAGS: the bit that is always 1.
pub const RFLAGS_FIXED: u64 = 1 << 1;
/// RFLAGS.TF.
pub const RFLAGS_TF: u64 = 1 << 8;
/// RFLAGS.IF.
pub const RFLAGS_IF: u64 = 1 << 9;
/// RFLAGS.RF.
pub const RFLAGS_RF: u64 = 1 << 16;
/// RFLAGS.VM.
pub const RFLAGS_VM: u64 = 1 << 17;
/// RFLAGS.AC.
pub const RFLAGS_AC: u64 = 1 << 18;

/// Access rights of a code segment: code of 32 bits, outside of 64-bit mode.
pub const RIGHTS_DEFAULT_BIG: u32 = 1 << 14;

/// PAUSEs further apart than this, in TSC ticks, are not of one loop. KVM's default.
const PAUSE_GAP: u32 = 128;
/// How long, in TSC ticks, such a loop may go on. KVM's default.
const PAUSE_WINDOW: u32 = 4096;

/// IA32_PAT after reset: SDM volume 3, section "Programming the PAT".
const PAT_RESET: u64 = 0x0007_0406_0007_0406;

/// Addresses of the structures that the VMCS points to, and the VM-wide identifiers.
#[derive(Debug, Clone, Copy)]
pub struct Pointers {
    /// Host-physical address of the page that is both I/O bitmaps.
    pub io_bitmap: u64,
    /// Host-physical address of the MSR bitmaps.
    pub msr_bitmap: u64,
    /// EPT pointer.
    pub eptp: u64,
    /// Virtual-processor identifier, not 0.
    pub vpid: u16,
}

/// A segment register: selector, base, limit, and access rights in the VMCS's format, SDM volume
/// 3, section "Guest Register State".
type Segment = (u16, u64, u32, u32);

/// Flat data: type 3 (read/write, accessed), S, P, D/B, G.
const FLAT_DATA: Segment = (0x10, 0, u32::MAX, 0xc093);
/// Flat code: type 11 (execute/read, accessed), S, P, D/B, G.
const FLAT_CODE: Segment = (0x08, 0, u32::MAX, 0xc09b);
/// Busy 32-bit TSS.
const FLAT_TSS: Segment = (0x18, 0, 0x67, 0x8b);
/// Unusable.
const NULL: Segment = (0, 0, 0, 1 << 16);

/// Flat 32-bit segments, as PVH and multiboot want them, in the order of [`GUEST_SEGMENTS`].
const FLAT_32: [Segment; 8] =
    [FLAT_DATA, FLAT_CODE, FLAT_DATA, FLAT_DATA, FLAT_DATA, FLAT_DATA, NULL, FLAT_TSS];

/// After INIT: type 3 (read/write, accessed), S, P.
const INIT_DATA: Segment = (0, 0, 0xffff, 0x93);
/// The code segment, too, is a writable one; its base is 64 KiB below 4 GiB.
const INIT_CODE: Segment = (0xf000, 0xffff_0000, 0xffff, 0x93);
/// LDT.
const INIT_LDT: Segment = (0, 0, 0xffff, 0x82);
/// Busy TSS. The SDM's table does not say of how many bits; IA-32e mode, which the guest may enter
/// before it loads TR, takes only that of 32.
const INIT_TSS: Segment = (0, 0, 0xffff, 0x8b);

/// The segments after INIT, in the order of [`GUEST_SEGMENTS`].
const INIT: [Segment; 8] =
    [INIT_DATA, INIT_CODE, INIT_DATA, INIT_DATA, INIT_DATA, INIT_DATA, INIT_LDT, INIT_TSS];
/// Where a CPU starts after INIT: 16 bytes below the end of its code segment.
const INIT_RIP: u64 = 0xfff0;

fn write_segments(vmcs: &mut impl VmcsWrite, segments: [Segment; 8]) {
    for (fields, (selector, base, limit, rights)) in GUEST_SEGMENTS.into_iter().zip(segments) {
        vmcs.write(fields.selector, selector);
        vmcs.write(fields.base, base);
        vmcs.write(fields.limit, limit);
        vmcs.write(fields.rights, rights);
    }
}

/// Writes everything but the host state: controls, and a guest as it is after RESET.
pub fn initialize(
    vmcs: &mut (impl VmcsRead + VmcsWrite),
    caps: &Capabilities,
    at: &Pointers,
    cr4: &Cr4,
) {
    let optional = capability::SECONDARY_OPTIONAL.bits() & caps.secondary.supported();
    let secondary = capability::SECONDARY.bits() | optional;
    vmcs.write(PIN_BASED_CONTROLS, caps.pin.adjust(capability::PIN.bits()));
    vmcs.write(PRIMARY_CONTROLS, caps.primary.adjust(capability::PRIMARY.bits()));
    vmcs.write(SECONDARY_CONTROLS, caps.secondary.adjust(secondary));
    vmcs.write(EXIT_CONTROLS, caps.exit.adjust(capability::EXIT.bits()));
    vmcs.write(ENTRY_CONTROLS, caps.entry.adjust(capability::ENTRY.bits()));
    const _: () = assert!(capability::EXIT.contains(Exit::SAVE_PREEMPTION_TIMER));

    vmcs.write(VPID, at.vpid);
    vmcs.write(EPT_POINTER, at.eptp);
    vmcs.write(IO_BITMAP_A, at.io_bitmap);
    vmcs.write(IO_BITMAP_B, at.io_bitmap);
    vmcs.write(MSR_BITMAPS, at.msr_bitmap);
    vmcs.write(EXCEPTION_BITMAP, EXCEPTIONS);
    if caps.has_secondary(Secondary::PAUSE_LOOP_EXITING) {
        vmcs.write(PLE_GAP, PAUSE_GAP);
        vmcs.write(PLE_WINDOW, PAUSE_WINDOW);
    }
    vmcs.write(CR0_MASK, !CR0_GUEST_OWNED);
    vmcs.write(CR4_MASK, !cr4.guest_owned());

    const ZERO_32: [Field<W32>; 8] = [
        PAGE_FAULT_ERROR_CODE_MASK,
        PAGE_FAULT_ERROR_CODE_MATCH,
        CR3_TARGET_COUNT,
        EXIT_MSR_STORE_COUNT,
        EXIT_MSR_LOAD_COUNT,
        ENTRY_MSR_LOAD_COUNT,
        PREEMPTION_TIMER_VALUE,
        // Like the other MSRs below it is RESET's, not INIT's.
        GUEST_SYSENTER_CS,
    ];
    ZERO_32.into_iter().for_each(|field| vmcs.write(field, 0));
    for field in [TSC_OFFSET, GUEST_IA32_DEBUGCTL] {
        vmcs.write(field, 0);
    }
    for field in [GUEST_SYSENTER_ESP, GUEST_SYSENTER_EIP] {
        vmcs.write(field, 0);
    }
    vmcs.write(GUEST_IA32_PAT, PAT_RESET);
    // No shadow VMCS: SDM volume 3, section "Guest Non-Register State".
    vmcs.write(VMCS_LINK_POINTER, u64::MAX);
    vmcs.write(CR0_READ_SHADOW, CR0_ET | CR0_CD | CR0_NW);
    init(vmcs, cr4);
}

/// Turns the guest after RESET into one in flat 32-bit protected mode with paging off that starts
/// at `rip`, as the x86/HVM direct boot ABI (PVH) has it.
pub fn flat_protected(vmcs: &mut impl VmcsWrite, rip: u32) {
    write_segments(vmcs, FLAT_32);
    for field in [GUEST_GDTR_LIMIT, GUEST_IDTR_LIMIT] {
        vmcs.write(field, 0);
    }
    vmcs.write(CR0_READ_SHADOW, CR0_PE | CR0_ET);
    vmcs.write(GUEST_CR0, CR0_PE | CR0_ET | CR0_NE);
    vmcs.write(GUEST_RIP, rip.into());
}

/// INIT: writes what of the guest's state it resets. A VMCS that [`initialize`] wrote is meant.
///
/// Source: SDM volume 3, section "Processor State After Reset", table "IA-32 and Intel 64 Processor
/// States Following Power-up, Reset, or INIT". CR0.CD and NW stay as the guest has set them, and
/// so do MSRs but EFER. The activity state is active: the hypervisor itself keeps a vCPU that waits
/// for its start from running.
///
/// Not in a VMCS, and left to the caller: the general registers but RSP (0; EDX has what leaf 1 of
/// CPUID says in EAX), CR2 (0), DR0 to DR3 (0), DR6 (0xffff0ff0), the local APIC, the TLB.
pub fn init(vmcs: &mut (impl VmcsRead + VmcsWrite), cr4: &Cr4) {
    write_segments(vmcs, INIT);
    const ZERO_32: [Field<W32>; 3] =
        [ENTRY_INTERRUPTION_INFO, GUEST_INTERRUPTIBILITY, GUEST_ACTIVITY_STATE];
    const ZERO_NATURAL: [Field<Natural>; 6] = [
        GUEST_CR3,
        GUEST_GDTR_BASE,
        GUEST_IDTR_BASE,
        GUEST_RSP,
        GUEST_PENDING_DEBUG,
        CR4_READ_SHADOW,
    ];
    ZERO_32.into_iter().for_each(|field| vmcs.write(field, 0));
    ZERO_NATURAL.into_iter().for_each(|field| vmcs.write(field, 0));
    for field in [GUEST_GDTR_LIMIT, GUEST_IDTR_LIMIT] {
        vmcs.write(field, 0xffff);
    }
    vmcs.write(GUEST_RIP, INIT_RIP);
    vmcs.write(GUEST_RFLAGS, RFLAGS_FIXED);
    vmcs.write(GUEST_DR7, 0x400);

    let caching = vmcs.read(CR0_READ_SHADOW) & (CR0_CD | CR0_NW);
    vmcs.write(CR0_READ_SHADOW, CR0_ET | caching);
    vmcs.write(GUEST_CR0, CR0_ET | CR0_NE);
    vmcs.write(GUEST_CR4, cr4.real(0));
    let entry = vmcs.read(ENTRY_CONTROLS);
    vmcs.write(ENTRY_CONTROLS, entry & !Entry::IA32E_MODE_GUEST.bits());
    vmcs.write(GUEST_IA32_EFER, 0);
}

/// A start-up IPI: has a guest after [`init`] begin with the page of number `vector`, below 1 MiB.
///
/// Source: SDM volume 3, section "MP Initialization Protocol Algorithm for MP Systems".
pub fn startup(vmcs: &mut impl VmcsWrite, vector: u8) {
    vmcs.write(GUEST_CS_SELECTOR, u16::from(vector) << 8);
    vmcs.write(GUEST_CS_BASE, u64::from(vector) << 12);
    vmcs.write(GUEST_RIP, 0);
}

/// What the guest may set in CR4, and what it has there in truth.
#[derive(Debug, Clone, Copy)]
pub struct Cr4 {
    /// What the guest may set: [`crate::cpuid::CpuidTable::cr4_allowed`].
    pub allowed: u64,
}

impl Cr4 {
    /// Bits that the guest changes without an exit.
    pub const fn guest_owned(&self) -> u64 {
        self.allowed & !CR4_MCE
    }

    /// The real CR4 behind the guest's `value`.
    pub const fn real(&self, value: u64) -> u64 {
        value | CR4_VMXE | CR4_MCE
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checks::tests::{CR4, PLAIN, Recorded, STATES, reset, violations};

    /// CR0 as the guest reads it.
    fn guest_cr0(vmcs: &Recorded) -> u64 {
        let (owned, shadow) = (vmcs.read(GUEST_CR0), vmcs.read(CR0_READ_SHADOW));
        let mask = vmcs.read(CR0_MASK);
        owned & !mask | shadow & mask
    }

    #[test]
    fn the_state_after_reset_is_that_of_the_manual() {
        let vmcs = reset();
        assert_eq!(guest_cr0(&vmcs), 0x6000_0010);
        assert_eq!(vmcs.read(GUEST_CR4) & !vmcs.read(CR4_MASK), 0);
        assert_eq!(vmcs.read(CR4_READ_SHADOW), 0);
        // NE is 1 in VMX operation; the caches are never off.
        assert_eq!(vmcs.read(GUEST_CR0), CR0_ET | CR0_NE);
        assert_eq!((vmcs.read(GUEST_CR3), vmcs.read(GUEST_IA32_EFER)), (0, 0));
        assert_eq!((vmcs.read(GUEST_RFLAGS), vmcs.read(GUEST_DR7)), (2, 0x400));
        assert_eq!((vmcs.read(GUEST_RIP), vmcs.read(GUEST_RSP)), (0xfff0, 0));
        assert_eq!((vmcs.read(GUEST_CS_SELECTOR), vmcs.read(GUEST_CS_BASE)), (0xf000, 0xffff_0000));
        for (index, fields) in GUEST_SEGMENTS.into_iter().enumerate() {
            let is_cs = index == 1;
            assert!(is_cs || (vmcs.read(fields.selector), vmcs.read(fields.base)) == (0, 0));
            assert_eq!(vmcs.read(fields.limit), 0xffff);
            let rights = [0x93, 0x93, 0x93, 0x93, 0x93, 0x93, 0x82, 0x8b][index];
            assert_eq!(vmcs.read(fields.rights), rights);
        }
        for (base, limit) in
            [(GUEST_GDTR_BASE, GUEST_GDTR_LIMIT), (GUEST_IDTR_BASE, GUEST_IDTR_LIMIT)]
        {
            assert_eq!((vmcs.read(base), vmcs.read(limit)), (0, 0xffff));
        }
        assert_eq!(vmcs.read(GUEST_IA32_PAT), 0x0007_0406_0007_0406);
    }

    /// What INIT leaves as it was, besides controls.
    const KEPT: [u32; 8] = [
        GUEST_SYSENTER_CS.encoding(),
        GUEST_SYSENTER_ESP.encoding(),
        GUEST_SYSENTER_EIP.encoding(),
        GUEST_IA32_PAT.encoding(),
        GUEST_IA32_DEBUGCTL.encoding(),
        TSC_OFFSET.encoding(),
        VMCS_LINK_POINTER.encoding(),
        PREEMPTION_TIMER_VALUE.encoding(),
    ];

    #[test]
    fn init_resets_whatever_there_was() {
        for (name, state) in STATES {
            let mut vmcs = state();
            // More than these states differ in.
            vmcs.write(GUEST_RSP, 0x1234);
            vmcs.write(GUEST_CR3, 0x5000);
            vmcs.write(GUEST_DR7, 0x455);
            vmcs.write(GUEST_GDTR_BASE, 0x6000);
            vmcs.write(GUEST_IDTR_BASE, 0x7000);
            vmcs.write(GUEST_PENDING_DEBUG, 1 << 14);
            vmcs.write(GUEST_INTERRUPTIBILITY, 1 << 3 | 1);
            vmcs.write(GUEST_ACTIVITY_STATE, 1);
            vmcs.write(ENTRY_INTERRUPTION_INFO, 0x8000_0040);
            vmcs.write(GUEST_CR4, CR4.real(0x7b0));
            vmcs.write(CR4_READ_SHADOW, 0x7b0);
            for (value, field) in (0x100..).zip(KEPT) {
                vmcs.0.insert(field, value);
            }
            vmcs.write(VMCS_LINK_POINTER, u64::MAX);
            let before = vmcs.clone();
            init(&mut vmcs, &CR4);

            let mut expected = reset();
            for field in KEPT {
                expected.0.insert(field, before.0[&field]);
            }
            // PDPTEs mean nothing without paging.
            vmcs.0.retain(|field, _| expected.0.contains_key(field));
            for field in [PRIMARY_CONTROLS, SECONDARY_CONTROLS] {
                expected.write(field, before.read(field));
            }
            let caching = before.read(CR0_READ_SHADOW) & (CR0_CD | CR0_NW);
            expected.write(CR0_READ_SHADOW, CR0_ET | caching);
            assert_eq!(vmcs, expected, "{name}");
        }
    }

    #[test]
    fn init_keeps_what_the_guest_set_for_its_caches() {
        for caching in [0, CR0_CD, CR0_CD | CR0_NW] {
            let mut vmcs = reset();
            vmcs.write(CR0_READ_SHADOW, CR0_PE | CR0_ET | CR0_NE | caching);
            vmcs.write(GUEST_CR0, CR0_PE | CR0_ET | CR0_NE);
            init(&mut vmcs, &CR4);
            assert_eq!(guest_cr0(&vmcs), CR0_ET | caching);
        }
    }

    #[test]
    fn a_start_changes_where_the_guest_begins_and_nothing_else() {
        for vector in 0..=u8::MAX {
            let mut vmcs = reset();
            startup(&mut vmcs, vector);
            assert_eq!(violations(&vmcs, &PLAIN), [], "{vector:#x}");
            let base = vmcs.read(GUEST_CS_BASE);
            assert_eq!(base, u64::from(vmcs.read(GUEST_CS_SELECTOR)) << 4);
            assert_eq!(base + vmcs.read(GUEST_RIP), u64::from(vector) * 4096);
            vmcs.write(GUEST_CS_SELECTOR, 0xf000);
            vmcs.write(GUEST_CS_BASE, 0xffff_0000);
            vmcs.write(GUEST_RIP, 0xfff0);
            assert_eq!(vmcs, reset());
        }
    }
}
