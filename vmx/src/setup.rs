//! The contents of a fresh VMCS, as tables.

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
/// CR4.VMXE: set while guests run, and hidden from them.
pub const CR4_VMXE: u64 = 1 << 13;

/// EFER.LME.
pub const EFER_LME: u64 = 1 << 8;
/// EFER.LMA.
pub const EFER_LMA: u64 = 1 << 10;

/// RFLAGS: the bit that is always 1.
pub const RFLAGS_FIXED: u64 = 1 << 1;
/// RFLAGS.TF.
pub const RFLAGS_TF: u64 = 1 << 8;
/// RFLAGS.IF.
pub const RFLAGS_IF: u64 = 1 << 9;
/// RFLAGS.VM.
pub const RFLAGS_VM: u64 = 1 << 17;
/// RFLAGS.AC.
pub const RFLAGS_AC: u64 = 1 << 18;

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

/// Segment registers at the start: selector, limit, and access rights in the VMCS's format, SDM
/// volume 3, section "Guest Register State".
type Segment = (u16, u32, u32);

/// Flat data: type 3 (read/write, accessed), S, P, D/B, G.
const DATA: Segment = (0x10, u32::MAX, 0xc093);
/// Flat code: type 11 (execute/read, accessed), S, P, D/B, G.
const CODE: Segment = (0x08, u32::MAX, 0xc09b);
/// Busy 32-bit TSS.
const TSS: Segment = (0x18, 0x67, 0x8b);
/// Unusable.
const NULL: Segment = (0, 0, 1 << 16);

/// Flat 32-bit segments, as PVH and multiboot want them, in the order of [`GUEST_SEGMENTS`].
const FLAT_32: [Segment; 8] = [DATA, CODE, DATA, DATA, DATA, DATA, NULL, TSS];

/// Writes everything but the host state: controls, and a guest in flat 32-bit protected mode with
/// paging off that starts at `rip`.
pub fn initialize(
    vmcs: &mut impl VmcsWrite,
    caps: &Capabilities,
    at: &Pointers,
    cr4: &Cr4,
    rip: u32,
) {
    let optional = capability::SECONDARY_OPTIONAL.bits() & caps.secondary.supported();
    let secondary = capability::SECONDARY.bits() | optional;
    vmcs.write(PIN_BASED_CONTROLS, caps.pin.adjust(capability::PIN.bits()));
    vmcs.write(PRIMARY_CONTROLS, caps.primary.adjust(capability::PRIMARY.bits()));
    vmcs.write(SECONDARY_CONTROLS, caps.secondary.adjust(secondary));
    vmcs.write(EXIT_CONTROLS, caps.exit.adjust(capability::EXIT.bits()));
    vmcs.write(ENTRY_CONTROLS, caps.entry.adjust(capability::ENTRY.bits()));
    const _: () = assert!(!capability::ENTRY.contains(Entry::IA32E_MODE_GUEST));
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

    const ZERO_32: [Field<W32>; 13] = [
        PAGE_FAULT_ERROR_CODE_MASK,
        PAGE_FAULT_ERROR_CODE_MATCH,
        CR3_TARGET_COUNT,
        EXIT_MSR_STORE_COUNT,
        EXIT_MSR_LOAD_COUNT,
        ENTRY_MSR_LOAD_COUNT,
        ENTRY_INTERRUPTION_INFO,
        GUEST_INTERRUPTIBILITY,
        GUEST_ACTIVITY_STATE,
        GUEST_SYSENTER_CS,
        GUEST_GDTR_LIMIT,
        GUEST_IDTR_LIMIT,
        PREEMPTION_TIMER_VALUE,
    ];
    const ZERO_NATURAL: [Field<Natural>; 8] = [
        GUEST_CR3,
        GUEST_GDTR_BASE,
        GUEST_IDTR_BASE,
        GUEST_RSP,
        GUEST_PENDING_DEBUG,
        GUEST_SYSENTER_ESP,
        GUEST_SYSENTER_EIP,
        CR4_READ_SHADOW,
    ];
    ZERO_32.into_iter().for_each(|field| vmcs.write(field, 0));
    ZERO_NATURAL.into_iter().for_each(|field| vmcs.write(field, 0));
    for field in [TSC_OFFSET, GUEST_IA32_DEBUGCTL, GUEST_IA32_EFER] {
        vmcs.write(field, 0);
    }
    vmcs.write(GUEST_IA32_PAT, PAT_RESET);
    // No shadow VMCS: SDM volume 3, section "Guest Non-Register State".
    vmcs.write(VMCS_LINK_POINTER, u64::MAX);

    for (fields, (selector, limit, rights)) in GUEST_SEGMENTS.into_iter().zip(FLAT_32) {
        vmcs.write(fields.selector, selector);
        vmcs.write(fields.base, 0);
        vmcs.write(fields.limit, limit);
        vmcs.write(fields.rights, rights);
    }
    vmcs.write(GUEST_RIP, u64::from(rip));
    vmcs.write(GUEST_RFLAGS, RFLAGS_FIXED);
    vmcs.write(GUEST_DR7, 0x400);

    vmcs.write(CR0_MASK, !CR0_GUEST_OWNED);
    vmcs.write(CR0_READ_SHADOW, CR0_PE | CR0_ET);
    vmcs.write(GUEST_CR0, CR0_PE | CR0_ET | CR0_NE);
    vmcs.write(CR4_MASK, !cr4.guest_owned());
    vmcs.write(GUEST_CR4, cr4.real(0));
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
