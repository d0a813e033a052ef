-- Programs for LuaJIT whose output must be the same with its compiler (luajit check.lua) and without (luajit -joff).
local rounds = tonumber(arg[1] or 1)
local bit = require("bit")
local ffi = require("ffi")

local function check(what, got, wanted)
  if got ~= wanted then
    io.stderr:write(string.format("%s: %s instead of %s\n", what, tostring(got), tostring(wanted)))
    os.exit(1)
  end
end

local function queens(n)
  local count, columns, up, down = 0, {}, {}, {}
  local function place(row)
    if row > n then count = count + 1 return end
    for c = 1, n do
      if not columns[c] and not up[row + c] and not down[row - c + n] then
        columns[c], up[row + c], down[row - c + n] = true, true, true
        place(row + 1)
        columns[c], up[row + c], down[row - c + n] = nil, nil, nil
      end
    end
  end
  place(1)
  return count
end

local function sieve(n)
  local composite, count = ffi.new("uint8_t[?]", n + 1), 0
  for i = 2, n do
    if composite[i] == 0 then
      count = count + 1
      for j = i * i, n, i do composite[j] = 1 end
    end
  end
  return count
end

local function mandelbrot(size)
  local inside = 0
  for y = 0, size - 1 do
    for x = 0, size - 1 do
      local cr, ci, zr, zi, n = 3 * x / size - 2, 2 * y / size - 1, 0, 0, 0
      while n < 50 and zr * zr + zi * zi < 4 do
        zr, zi, n = zr * zr - zi * zi + cr, 2 * zr * zi + ci, n + 1
      end
      if n == 50 then inside = inside + 1 end
    end
  end
  return inside
end

local function strings(n)
  local words, h = {}, 0
  for i = 1, n do words[#words + 1] = string.format("%x:%d", i * 2654435761 % 4294967296, i) end
  table.sort(words)
  local text = table.concat(words, " ")
  for a, b in text:gmatch("(%x+):(%d+)") do
    h = bit.bxor(bit.rol(h, 5), tonumber(b), #a)
    check("words", tonumber(b) * 2654435761 % 4294967296, tonumber(a, 16))
  end
  return h
end

local function coroutines(n)
  local function numbers(limit)
    return coroutine.wrap(function() for i = 1, limit do coroutine.yield(i) end end)
  end
  local sum = 0
  for i in numbers(n) do sum = sum + i end
  check("coroutines", sum, n * (n + 1) / 2)
  local failures = 0
  for i = 1, 1000 do
    local ok, message = pcall(function() if i % 3 == 0 then error({ i }) end return i end)
    if not ok then failures = failures + message[1] end
  end
  return failures
end

local function structures(n)
  ffi.cdef [[ typedef struct { double x; int32_t n; uint8_t b[4]; int64_t l; } check_s; ]]
  local a = ffi.new("check_s[?]", n)
  for i = 0, n - 1 do a[i].x, a[i].n, a[i].b[i % 4], a[i].l = i / 3, -i, i % 256, i * 1000003LL end
  local x, l = 0, 0LL
  for i = 0, n - 1 do x, l = x + a[i].x + a[i].n + a[i].b[i % 4], l + a[i].l end
  return string.format("%.6f %s", x, tostring(l))
end

for round = 1, rounds do
  check("queens", queens(8), 92)
  check("sieve", sieve(1000000), 78498)
  print(round, mandelbrot(200 + round), strings(20000 + round), coroutines(30000), structures(50000 + round))
  -- New code each time: loops that are compiled anew.
  for i = 1, 100 do
    local f = assert(loadstring(string.format("local s = 0 for i = 1, ... do s = (s * %d + i) %% 1000003 end return s", i + round)))
    local s = 0
    for k = 1, 300 do s = (s * (i + round) + k) % 1000003 end
    check("loaded", f(300), s)
  end
end
