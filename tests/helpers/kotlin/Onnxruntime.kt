// Stands in for onnxruntime's Java API where only Python has onnxruntime: each call goes to the parent process.
// A tensor that is read after it was closed is an error, as it is in the real one.
package ai.onnxruntime

import java.io.DataInputStream
import java.io.DataOutputStream
import java.nio.FloatBuffer
import java.nio.IntBuffer
import java.nio.LongBuffer
import java.util.Optional

object Parent {
    val to = DataOutputStream(System.out.buffered(1 shl 20))
    val from = DataInputStream(System.`in`.buffered(1 shl 20))

    fun writeText(text: String) = text.toByteArray().let { to.writeInt(it.size); to.write(it) }

    fun readText(): String = ByteArray(from.readInt()).also { from.readFully(it) }.decodeToString()
}

interface OnnxValue : AutoCloseable

class OnnxTensor private constructor(val shape: LongArray, private val kind: Char, private val values: Any) : OnnxValue {
    private var closed = false

    val floatBuffer: FloatBuffer
        get() {
            check(!closed) { "the tensor is closed" }
            return FloatBuffer.wrap((values as FloatArray).copyOf())
        }

    override fun close() {
        closed = true
    }

    internal fun write() {
        check(!closed) { "a closed tensor is fed" }
        Parent.to.writeByte(kind.code)
        Parent.to.writeInt(shape.size)
        shape.forEach { Parent.to.writeLong(it) }
        when (values) {
            is FloatArray -> values.forEach { Parent.to.writeFloat(it) }
            is LongArray -> values.forEach { Parent.to.writeLong(it) }
            is IntArray -> values.forEach { Parent.to.writeInt(it) }
        }
    }

    companion object {
        private fun checked(size: Int, shape: LongArray) =
            check(size.toLong() == shape.fold(1L, Long::times)) { "$size values for ${shape.toList()}" }

        @Suppress("UNUSED_PARAMETER")
        fun createTensor(env: OrtEnvironment, data: FloatBuffer, shape: LongArray) =
            FloatArray(data.remaining()).let { data.get(it); checked(it.size, shape); OnnxTensor(shape, 'F', it) }

        @Suppress("UNUSED_PARAMETER")
        fun createTensor(env: OrtEnvironment, data: LongBuffer, shape: LongArray) =
            LongArray(data.remaining()).let { data.get(it); checked(it.size, shape); OnnxTensor(shape, 'L', it) }

        @Suppress("UNUSED_PARAMETER")
        fun createTensor(env: OrtEnvironment, data: IntBuffer, shape: LongArray) =
            IntArray(data.remaining()).let { data.get(it); checked(it.size, shape); OnnxTensor(shape, 'I', it) }

        internal fun read(): OnnxTensor {
            val shape = LongArray(Parent.from.readInt()) { Parent.from.readLong() }
            return OnnxTensor(shape, 'F', FloatArray(shape.fold(1L, Long::times).toInt()) { Parent.from.readFloat() })
        }
    }
}

class OrtEnvironment {
    @Suppress("UNUSED_PARAMETER")
    fun createSession(path: String, options: OrtSession.SessionOptions) = OrtSession(path)

    companion object {
        fun getEnvironment() = OrtEnvironment()
    }
}

class OrtSession(path: String) : AutoCloseable {
    class SessionOptions

    class Result(private val values: Map<String, OnnxTensor>) : AutoCloseable {
        fun get(name: String): Optional<OnnxValue> = Optional.ofNullable(values[name])

        override fun close() = values.values.forEach { it.close() }
    }

    init {
        Parent.to.writeByte('S'.code)
        Parent.writeText(path)
    }

    fun run(inputs: Map<String, OnnxTensor>): Result {
        Parent.to.writeByte('R'.code)
        Parent.to.writeInt(inputs.size)
        for ((name, tensor) in inputs) {
            Parent.writeText(name)
            tensor.write()
        }
        Parent.to.flush()
        return Result((0 until Parent.from.readInt()).associate { Parent.readText() to OnnxTensor.read() })
    }

    override fun close() {}
}
