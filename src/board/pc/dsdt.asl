/*
 * The devices of the PC board, for the guest's ACPI interpreter. iasl compiles it at build time.
 *
 * What depends on the configuration (PCI's 64-bit window, the processors) is in the SSDT that acpi.c writes.
 * ACPI 6.5; PCI Firmware Specification 3.3.
 */
#include "layout.h"

DefinitionBlock ("", "DSDT", 2, "RNGFRT", "RINGFORT", 1)
{
    External (\_SB.W64R, BuffObj)   // a resource template with PCI's 64-bit window

    Name (\_S5, Package (4) { PC_S5_TYPE, PC_S5_TYPE, 0, 0 })

    Scope (\_SB)
    {
        Device (PCI0)
        {
            Name (_HID, EisaId ("PNP0A08"))
            Name (_CID, EisaId ("PNP0A03"))
            Name (_SEG, 0)
            Name (_BBN, 0)
            Name (_UID, 0)

            Name (CRES, ResourceTemplate ()
            {
                WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode,
                    0, 0, 255, 0, 256)
                IO (Decode16, 0xCF8, 0xCF8, 1, 8)
                WordIO (ResourceProducer, MinFixed, MaxFixed, PosDecode, EntireRange,
                    0, PC_PCI_IO_BASE, PC_PCI_IO_LAST, 0, PC_PCI_IO_SIZE)
                DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite,
                    0, PC_MEM32_BASE, PC_MEM32_LAST, 0, PC_MEM32_SIZE)
            })
            Method (_CRS, 0, Serialized)
            {
                Return (ConcatenateResTemplate (CRES, W64R))
            }

            // The OS may have native control of hot plug, PME, AER and the PCI Express capability.
            Method (_OSC, 4, Serialized)
            {
                CreateDWordField (Arg3, 0, CDW1)
                If (Arg0 != ToUUID ("33DB4D5B-1FF7-401C-9657-7441C03DD766"))
                {
                    CDW1 |= 4               // unrecognized UUID
                    Return (Arg3)
                }
                If (Arg1 != 1)
                {
                    CDW1 |= 8               // unrecognized revision
                }
                If (Arg2 > 2)
                {
                    CreateDWordField (Arg3, 8, CDW3)
                    If (CDW3 & ~0x1F)
                    {
                        CDW1 |= 0x10        // capabilities bits have been masked
                        CDW3 &= 0x1F
                    }
                }
                Return (Arg3)
            }

            // INTA…INTD of slot n are GSIs 16 + (n + pin) % 4.
            #include "prt.asl"
        }

        // Keeps the OS from using the ECAM window and the power block for anything else.
        Device (MBRD)
        {
            Name (_HID, EisaId ("PNP0C02"))
            Name (_UID, 0)
            Name (_CRS, ResourceTemplate ()
            {
                Memory32Fixed (ReadWrite, PC_ECAM_BASE, PC_ECAM_SIZE)
                IO (Decode16, PC_POWER_PORT, PC_POWER_PORT, 1, PC_POWER_PORTS)
            })
        }

        Device (COM1)
        {
            Name (_HID, EisaId ("PNP0501"))
            Name (_UID, 1)
            Name (_DDN, "COM1")
            Name (_CRS, ResourceTemplate ()
            {
                IO (Decode16, PC_COM1_PORT, PC_COM1_PORT, 1, PC_COM1_PORTS)
                Interrupt (ResourceConsumer, Level, ActiveHigh, Exclusive) { PC_COM1_GSI }
            })
        }

        Device (RTC0)
        {
            Name (_HID, EisaId ("PNP0B00"))
            Name (_CRS, ResourceTemplate ()
            {
                IO (Decode16, PC_RTC_PORT, PC_RTC_PORT, 1, PC_RTC_PORTS)
                Interrupt (ResourceConsumer, Level, ActiveHigh, Exclusive) { PC_RTC_GSI }
            })
        }

        Device (PWRB)
        {
            Name (_HID, EisaId ("PNP0C0C"))
            Name (_UID, 0)
        }

        // Generic event device: one interrupt, one register that says why (and forgets when read).
        Device (GED0)
        {
            Name (_HID, "ACPI0013")
            Name (_UID, 0)
            Name (_CRS, ResourceTemplate ()
            {
                Interrupt (ResourceConsumer, Level, ActiveHigh, Exclusive) { PC_GED_GSI }
            })
            OperationRegion (EVRG, SystemIO, PC_GED_EVENTS, 4)
            Field (EVRG, DWordAcc, NoLock, WriteAsZeros)
            {
                EVTS, 32
            }
            Method (_EVT, 1, Serialized)
            {
                Local0 = EVTS
                If (Local0 & PC_GED_BUTTON)
                {
                    Notify (PWRB, 0x80)
                }
            }
        }
    }
}
